"""`python -m ar2diff.cli`, which torchrun and accelerate can launch."""

from .main import main

main()
