"""The embedded model: this folder is a Hugging Face checkpoint, and __main__.py its recipe."""
