"""Kernels of causal attention: one file each, and the choice between them."""
