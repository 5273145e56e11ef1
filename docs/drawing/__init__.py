"""What the documentation's drawings are made of: plain SVG, written by small functions. ``pictures.py`` runs it."""
