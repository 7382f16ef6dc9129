"""`python -m ar2diff`."""

from .cli.main import main

main()
