"""Configurations, a file each: `--config=configs/<name>.py`."""
