"""Models for images, and the drawing of their predictions."""
