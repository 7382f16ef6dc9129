"""Recipes as YAML files, installed as `ar2diff.recipes`."""
