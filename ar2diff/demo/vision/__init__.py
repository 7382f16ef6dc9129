"""The embedded vision model: small pictures of handwritten digits, questions about them, and a
vision-language checkpoint that answers."""
