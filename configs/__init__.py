"""Configurations, one per file: `--config=configs/<name>.py`."""
