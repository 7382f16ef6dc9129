"""The command line, installed as `ar2diff.cli`."""
