"""What is written for one slide: tables, maps, pictures, outlines and points, from its windows."""

from bef_jax.slides.outputs.write import write_outputs

__all__ = ["write_outputs"]
