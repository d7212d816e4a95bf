"""Makes `python -m bef_jax` the same as `bef-jax`."""

from bef_jax.main import run

run()
