"""Converting autoregressive models, importing foreign diffusion models, and exporting to the
formats of other engines."""
