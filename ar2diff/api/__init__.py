"""The Python API: what `import ar2diff` offers beside the verbs."""
