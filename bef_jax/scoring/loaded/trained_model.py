"""Checkpoints that score patches, as `bef_jax.load` returns them."""

import dataclasses
import functools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from bef_jax.data.patch import class_names, tiling
from bef_jax.errors import UserError
from bef_jax.runtime import sharding
from bef_jax.scoring import scorer
from bef_jax.scoring.engines.predictor import EngineScorer
from bef_jax.scoring.gradcam import make_explainer
from bef_jax.scoring.loaded.images import Images, concatenate, join_finite, patches_of
from bef_jax.scoring.loaded.slide_prediction import (
    SlidePrediction,
    checked_stride,
    predict_slide,
)
from bef_jax.scoring.slide_scorer import for_slides
from bef_jax.training import checkpoint

_BATCH = 64  # patches per call of the explainer


@dataclasses.dataclass(frozen=True)
class TrainedModel:
    """A checkpoint that scores patches, on all devices.

    Weights are read and programs are compiled when they are first needed. Then both are kept.

    Attributes:
        checkpoint: the checkpoint's folder.
        config: the configuration of its training, prepared for scoring.
    """

    checkpoint: Path
    config: ConfigDict

    @property
    def classes(self) -> tuple[str, ...]:
        """Returns the names of the classes, in the order of their numbers."""
        return class_names(self.config)

    @property
    def mpp(self) -> float | None:
        """Returns the micrometres per pixel of its training patches; None if unknown."""
        return self.config.data.mpp or None

    @property
    def threshold(self) -> float | None:
        """Returns the smallest probability that --mode=predict calls positive; None if K > 2."""
        return self.config.eval.threshold if len(self.classes) == 2 else None

    @functools.cached_property
    def operating_point(self) -> dict[str, Any] | None:
        """Returns the `temperature` and `threshold` that training chose on valid, or None."""
        return checkpoint.read_metadata(self.checkpoint).get("operating_point")

    def predict(self, images: Images) -> np.ndarray:
        """Returns probabilities, float64, as --mode=predict computes them.

        They are [N], of class 1, or [N, K] for K > 2 classes, in the order of `classes`.

        Args:
            images: uint8 [N, S, S, 3], an iterator of such arrays, or a path. S is
                config.data.patch_size.

        Raises:
            UserError: the images have another shape or type, or can't be read.
            RunError: the scores of a patch are not finite.
        """
        return join_finite(self._predict(self._patches(images)), self._scores_shape)

    def predict_slide(
        self, path: str | os.PathLike, mpp: float | None = None, stride: int | None = None
    ) -> SlidePrediction:
        """Returns what the network says about a whole slide, which is read block by block.

        Args:
            path: of a slide that OpenSlide or tifffile reads.
            mpp: micrometres per pixel of the slide's largest level, which then counts instead of
                what the slide says.
            stride: pixels from one window to the next, at the network's scale. Without it, it is
                config.predict.stride.

        Raises:
            UserError: the slide cannot be read, or its scale or the network's does not fit or is
                not known.
            RunError: the scores of a patch are not finite.
        """
        if not self.mpp:
            raise UserError(
                f"{self.checkpoint}: does not know the um per pixel of its patches, which slides "
                "need; set model.config.data.mpp"
            )
        tiles = tiling(self.config)
        tiles = tiles._replace(stride=checked_stride(stride, tiles.stride))
        predict = for_slides(self._predict, self.config, self._mesh)
        return predict_slide(path, predict, tiles, self.mpp, len(self.classes), mpp)

    def features(self, images: Images) -> np.ndarray:
        """Returns the vector before the classifier, float32 [N, D]; takes what `predict` takes."""
        width = self._variables["params"]["classifier"]["kernel"].shape[0]
        found = self._features(self._patches(images))
        return concatenate(found, np.empty((0, width), np.float32))

    def gradcam(self, images: Images) -> np.ndarray:
        """Returns Grad-CAM maps, float32 [N, S, S], each scaled to a maximum of 1.

        They are of class 1, or for more than two classes of each patch's predicted class. A map is
        all 0 if no part of the patch raises that class's log-odds. Takes what `predict` takes.
        """
        batches = map(np.stack, scorer.in_batches(self._patches(images), _BATCH))
        maps = (_scaled(self._explain(batch, self._mapped_classes(batch))) for batch in batches)
        side = self.config.data.patch_size
        return concatenate(maps, np.empty((0, side, side), np.float32))

    def _mapped_classes(self, batch: np.ndarray) -> np.ndarray:
        if len(self.classes) == 2:
            return np.ones(len(batch), int)
        return join_finite(self._predict(iter(batch)), self._scores_shape).argmax(axis=1)

    @property
    def _scores_shape(self) -> tuple[int, ...]:
        """Returns the shape of one patch's scores: () of two classes, else (K,)."""
        count = len(self.classes)
        return () if count == 2 else (count,)

    def _patches(self, images: Images) -> Iterator[np.ndarray]:
        return patches_of(images, tiling(self.config), self.mpp)

    @functools.cached_property
    def _mesh(self) -> Mesh:
        return sharding.make_mesh()

    @functools.cached_property
    def _variables(self) -> dict:
        everywhere = sharding.replicated(self._mesh)
        return checkpoint.restore_variables(self.checkpoint, self.config, everywhere)

    @functools.cached_property
    def _predict(self) -> Callable:
        engine = EngineScorer(self.config, self._variables, self._mesh)
        return scorer.make_predictor(self.config, engine, self._mesh)

    @functools.cached_property
    def _features(self) -> Callable:
        return scorer.make_featurizer(self.config, self._variables, self._mesh)

    @functools.cached_property
    def _explain(self) -> Callable:
        return make_explainer(self.config, self._variables)


def _scaled(maps: np.ndarray) -> np.ndarray:
    """Returns maps [n, H, W], each scaled to a maximum of 1; a map of zeros stays the same."""
    most = maps.max((1, 2), keepdims=True)
    return maps / np.where(most > 0, most, 1)
