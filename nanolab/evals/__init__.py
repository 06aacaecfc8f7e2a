"""weights -> numbers."""
