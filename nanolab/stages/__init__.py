"""A whole stage of training, callable from Python."""
