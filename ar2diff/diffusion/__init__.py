"""The mathematics: noise, objective, loss and likelihood bounds. Tensors in, tensors out."""
