"""The embedded default: a small autoregressive checkpoint, its corpus and its build script."""
