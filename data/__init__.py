"""Data: text (text.py), Long Range Arena (lra.py) and images (images.py), prepared and read."""
