"""Recipes: strict schemas of YAML files, read without importing torch."""
