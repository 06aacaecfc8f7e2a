"""text -> batches."""
