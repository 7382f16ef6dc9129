"""Trainers. The data pipeline and the loss are ours; everything else comes from transformers."""
