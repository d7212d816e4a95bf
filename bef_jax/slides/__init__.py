"""Whole slides: reading them by blocks, where tissue is, what was found in them, and FROC."""
