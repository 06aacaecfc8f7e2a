"""ids -> logits."""
