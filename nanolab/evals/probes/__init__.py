"""Probes: what may be measured of a trained model beside its loss. Their table is nanolab/evals/modes.py."""
