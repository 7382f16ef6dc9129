"""Publishing on the Hugging Face Hub: model cards, uploads, and checking what was uploaded."""
