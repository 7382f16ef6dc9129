"""Autoregressive models in, foreign diffusion models in, formats of other engines out."""
