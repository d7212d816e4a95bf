"""--mode=froc: how well a run found the lesions of slides whose truth is known."""

from bef_jax.slides.froc.evaluate import evaluate_slides

__all__ = ["evaluate_slides"]
