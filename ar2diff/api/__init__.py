"""The Python API: what `import ar2diff` offers besides the verbs."""
