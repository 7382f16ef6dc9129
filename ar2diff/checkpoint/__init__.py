"""Checkpoint folders: found and checked, loaded, written whole or not at all; adapters and their
merge."""
