"""weights -> text."""
