"""logits -> weights."""
