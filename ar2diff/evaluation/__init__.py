"""Judging checkpoints: likelihood on held-out text, and whether a model is what its config says."""
