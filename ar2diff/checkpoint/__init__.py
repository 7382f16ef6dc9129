"""Checkpoint folders: finding, checking and loading them, and writing them whole or not at all;
adapters and merging them."""
