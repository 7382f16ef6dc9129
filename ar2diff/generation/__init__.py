"""Text in, text out: completing, filling and streaming with a loaded checkpoint; chat; prompt
files."""
