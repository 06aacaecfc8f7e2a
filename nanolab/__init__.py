"""nanolab: a research training harness for language models."""

__version__ = "0.1.0"
