"""Models that come from elsewhere, and models that leave: transformers, lm-evaluation-harness."""
