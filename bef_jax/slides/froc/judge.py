"""Compares the detections of a slide with its lesions."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from bef_jax.slides.froc.curve import Hits
from bef_jax.slides.froc.scored import ScoredSlide
from bef_jax.slides.froc.truth import Truth


@dataclass(frozen=True)
class Judged:
    """A slide and its truth, without pixels.

    Attributes:
        slide: what was found.
        is_tumour: whether it has tumour.
        lesion_class: its true class, or None.
        hits: see `Hits`.
        lesions: a row of lesions.csv for each lesion, without its false positives.
    """

    slide: ScoredSlide
    is_tumour: bool
    lesion_class: str | None
    hits: Hits
    lesions: list[dict[str, Any]]


def judge(slide: ScoredSlide, truth: Truth) -> Judged:
    """Returns which lesions were found, and the detections outside of lesions."""
    lesions, (x, y, probabilities) = truth.lesions, slide.detections.T
    numbers = lesions.at(x, y)
    highest = np.full(len(lesions.is_itc) + 1, np.nan)
    np.fmax.at(highest, numbers, probabilities)
    hits = Hits(probabilities[numbers == 0], highest[1:][~lesions.is_itc])
    rows = [
        {
            "slide": slide.name,
            "lesion": number,
            "x": round(float(lesions.centres[number - 1, 0])),
            "y": round(float(lesions.centres[number - 1, 1])),
            "longest_axis_um": float(lesions.longest_axes[number - 1]),
            "itc": bool(lesions.is_itc[number - 1]),
            "probability": None if np.isnan(highest[number]) else float(highest[number]),
        }
        for number in range(1, len(highest))
    ]
    return Judged(slide, truth.is_tumour, truth.lesion_class, hits, rows)
