"""Turns images into log-odds, and log-odds into metrics, intervals and heat maps."""
