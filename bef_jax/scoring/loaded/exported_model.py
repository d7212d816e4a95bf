"""Exported files that score patches, as `bef_jax.load` returns them."""

import dataclasses
import functools
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jax
import numpy as np
from jax.sharding import Mesh

from bef_jax.data.patch import PCAM_CENTER, PCAM_SIDE, Tiling
from bef_jax.errors import UserError
from bef_jax.runtime import sharding
from bef_jax.scoring import scorer
from bef_jax.scoring.loaded.exported_files import (
    EXPORT_AGAIN,
    READERS,
    Network,
    read_description,
)
from bef_jax.scoring.loaded.images import Images, join_finite, patches_of
from bef_jax.scoring.loaded.slide_prediction import (
    SlidePrediction,
    checked_stride,
    predict_slide,
)

_BATCH = 64  # patches per call of the file


@dataclasses.dataclass(frozen=True)
class ExportedModel:
    """A file of --mode=export that scores patches, on one device.

    Attributes:
        file: model.stablehlo or model.onnx.
    """

    file: Path

    @property
    def classes(self) -> tuple[str, ...] | None:
        """Returns the names of the classes; None if the file and its export.json do not say."""
        names = self._description.get("classes")
        return names and tuple(names)

    @property
    def mpp(self) -> float | None:
        """Returns the micrometres per pixel of its training patches; None if unknown."""
        return self._description.get("mpp")

    def predict(self, images: Images) -> np.ndarray:
        """Returns probabilities, float64 [N] or [N, K]; see `TrainedModel.predict`.

        Raises:
            UserError: the images have another shape or type, or can't be read.
            RunError: the scores of a patch are not finite.
        """
        network = self._network
        patches = patches_of(images, self._tiling(network.side), self.mpp)
        return join_finite(self._predict(patches), network.shape)

    def predict_slide(
        self, path: str | os.PathLike, mpp: float | None = None, stride: int | None = None
    ) -> SlidePrediction:
        """Returns what the network says about a whole slide; see `TrainedModel.predict_slide`.

        Without a stride, windows lie side by side.
        """
        if not self.mpp:
            raise UserError(
                f"{self.file}: it and export.json beside it don't say the um per pixel of its "
                "patches, which slides need; load its checkpoint instead"
            )
        network = self._network
        tiles = self._tiling(network.side)
        tiles = tiles._replace(stride=checked_stride(stride, tiles.stride))
        predict = functools.partial(self._predict, sizes=scorer.two_sizes(_BATCH, self._mesh))
        classes = network.shape[0] if network.shape else 2
        return predict_slide(path, predict, tiles, self.mpp, classes, mpp)

    def features(self, images: Images) -> NoReturn:
        """Raises `UserError`, because the file gives only probabilities and log-odds."""
        self._refuse("no features")

    def gradcam(self, images: Images) -> NoReturn:
        """Raises `UserError`, because the file gives only probabilities and log-odds."""
        self._refuse("no Grad-CAM")

    def _tiling(self, side: int) -> Tiling:
        """Returns how pictures are cut: each pixel is decided once."""
        # Neither a StableHLO file alone nor a file of an earlier version says its center.
        assumed = PCAM_CENTER if side == PCAM_SIDE else 0
        center = self._description.get("center", assumed) or side
        if not 0 < center <= side:
            raise UserError(
                f"{self.file}: its description gives center={center}, but patches have a side of "
                f"{side}; {EXPORT_AGAIN}"
            )
        return Tiling(side, center, stride=center)

    def _refuse(self, what: str) -> NoReturn:
        raise UserError(f"{self.file}: an exported file gives {what}; load its checkpoint instead")

    @functools.cached_property
    def _mesh(self) -> Mesh:
        # The file was exported for one device.
        return Mesh(np.array(jax.local_devices()[:1]), (sharding.AXIS,))

    def _predict(
        self, patches: Iterable[np.ndarray], sizes: Sequence[int] = ()
    ) -> Iterator[np.ndarray]:
        scores = scorer.map_patches(self._network.score, patches, _BATCH, self._mesh, sizes)
        return map(scorer.mean_probabilities, scores)

    @functools.cached_property
    def _network(self) -> Network:
        return READERS[self.file.suffix](self.file)

    @functools.cached_property
    def _description(self) -> dict[str, Any]:
        return read_description(self.file)
