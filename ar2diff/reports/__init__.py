"""Whether to use a model: speed, quality, length and control, measured beside its base."""
