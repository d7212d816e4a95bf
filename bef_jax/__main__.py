"""`python -m bef_jax` is `bef-jax`."""

from bef_jax.main import run

run()
