"""Configurations, one per file: `--config=<name>`. The package imports them as bef_jax.configs."""
