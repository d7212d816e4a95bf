"""The free-response operating characteristic (FROC) of detections, and how sure it is."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bef_jax.scoring.intervals import resamples

RATES = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)  # false positives per slide, whose mean is the score


@dataclass(frozen=True)
class Hits:
    """What the detections of one slide hit.

    Attributes:
        false_positives: float64 [F], the probabilities of detections outside of lesions.
        lesions: float64 [L], for each lesion that is no ITC, the highest probability in it; NaN if
            it was not found.
    """

    false_positives: np.ndarray
    lesions: np.ndarray


@dataclass(frozen=True)
class Curve:
    """Points of a FROC curve, from the highest threshold down; the first has no detections.

    Attributes:
        thresholds: float64 [P]; detections of at least this much count. The first is infinite.
        false_positives: float64 [P], the average over all slides.
        sensitivity: float64 [P], the share of lesions that are found.
    """

    thresholds: np.ndarray
    false_positives: np.ndarray
    sensitivity: np.ndarray

    def at(self, rates: Sequence[float]) -> np.ndarray:
        """Returns the sensitivity at average numbers of false positives, float64 [R].

        It is linear between points. Past the last one it is that of the last one. Of points with
        as many false positives, the most sensitive counts.
        """
        return np.interp(rates, self.false_positives, self.sensitivity)


class Froc:
    """The events of all slides in the order of their probabilities, for curves of resamples.

    The points are those of CAMELYON16's script, evaluation_FROC.py, with one difference. The script
    leaves out the lowest threshold, which is 0 if a lesion was not found, but a real one if all
    were found. Here a lesion that was not found has no threshold, and all thresholds count.
    """

    def __init__(self, slides: Sequence[Hits]) -> None:
        """Takes the hits of at least one slide."""
        false = [each.false_positives for each in slides]
        found = [each.lesions[~np.isnan(each.lesions)] for each in slides]
        values = np.concatenate([*false, *found])
        numbers = np.arange(len(slides))
        slide = np.concatenate(
            [np.repeat(numbers, list(map(len, each))) for each in (false, found)]
        )
        is_lesion = np.arange(len(values)) >= sum(map(len, false))
        order = np.argsort(-values, kind="stable")
        values = values[order]
        self._slide, self._is_lesion = slide[order], is_lesion[order]
        # The last event of each distinct probability.
        self._ends = np.flatnonzero(np.append(values[1:] != values[:-1], len(values) > 0))
        self._thresholds = np.append(np.inf, values[self._ends])
        self._lesions = np.array([len(each.lesions) for each in slides])

    def curve(self, weights: np.ndarray | None = None) -> Curve:
        """Returns the curve; without lesions, its sensitivity is NaN.

        Args:
            weights: int [slides], how often each slide counts; None: once.
        """
        weights = np.ones(len(self._lesions), int) if weights is None else weights
        of_event = weights[self._slide]
        false, found = (
            np.append(0, np.cumsum(of_event * part)[self._ends])
            for part in (~self._is_lesion, self._is_lesion)
        )
        lesions = weights @ self._lesions
        sensitivity = found / lesions if lesions else np.full(len(found), np.nan)
        return Curve(self._thresholds, false / weights.sum(), sensitivity)

    def resampled(self, rates: Sequence[float]) -> np.ndarray:
        """Returns the sensitivity at rates for 1,000 resamples of slides, [1000, R].

        They are the same at every call. NaN stands for a resample without lesions.
        """
        size = len(self._lesions)
        return np.array([self.curve(weights).at(rates) for weights in resamples(size)])


def score_of(sensitivity: np.ndarray) -> np.ndarray:
    """Returns CAMELYON16's score, the mean sensitivity at `RATES`, which are the last axis."""
    return sensitivity.mean(axis=-1)
