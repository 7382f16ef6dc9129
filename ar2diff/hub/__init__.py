"""Publishing on the Hugging Face Hub: model cards, uploads, and the comparison after the
download."""
