"""Architectural choices: one file per axis, and the tables of all axes."""
