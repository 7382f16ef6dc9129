"""Trainers: the data pipeline and the loss are ours, everything else is transformers'."""
