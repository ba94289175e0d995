"""Data: `text.py` for language models, `lra.py` for Long Range Arena."""
