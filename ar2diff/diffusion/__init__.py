"""The mathematics: noise, objective, loss and likelihood bounds; tensors in, tensors out."""
