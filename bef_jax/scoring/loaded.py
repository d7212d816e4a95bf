"""Trained networks in Python, as `bef_jax.load` returns them."""

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import jax
import jax.export
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from bef_jax.data import inputs
from bef_jax.data.patch import PCAM_CENTER, PCAM_SIDE, Tiling, class_names, tiling
from bef_jax.errors import UserError, install_command, reason_of
from bef_jax.runtime import sharding
from bef_jax.runtime.files import (
    check_regular,
    check_types,
    open_user_file,
    read_json,
    user_path,
)
from bef_jax.scoring import scorer, trained
from bef_jax.scoring.gradcam import make_explainer
from bef_jax.training import checkpoint

# uint8 [N, S, S, 3], an iterator of such arrays, or the path of any input of --mode=predict.
Images = np.ndarray | Iterable[np.ndarray] | str | os.PathLike

_BATCH = 64  # patches per call of an exported file, and per call of the explainer
_LARGEST = 400 << 20  # bytes of an exported file at most; EfficientNet-B7 has 0.3 GB
_EXPORT_AGAIN = "export again, or move export.json away"


def load(where: str | os.PathLike) -> "TrainedModel | ExportedModel":
    """Returns the trained network at `where`; see `load` in bef_jax/__init__.py."""
    path = user_path(where).resolve()
    if not path.is_dir():
        check_regular(path)
    if path.is_file() and path.suffix in _READERS:
        return ExportedModel(path)
    if not path.is_dir():
        raise UserError(
            f"load({str(where)!r}): neither a folder nor an exported file; give a run's folder, a "
            "checkpoint's folder, or a .stablehlo or .onnx file of --mode=export"
        )
    folder = trained.find(path)
    return TrainedModel(folder, trained.scoring_config(folder))


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
        return _join_finite(self._predict(self._patches(images)), self._scores_shape)

    def features(self, images: Images) -> np.ndarray:
        """Returns the vector before the classifier, float32 [N, D]; takes what `predict` takes."""
        width = self._variables["params"]["classifier"]["kernel"].shape[0]
        found = self._features(self._patches(images))
        return _concatenate(found, np.empty((0, width), np.float32))

    def gradcam(self, images: Images) -> np.ndarray:
        """Returns Grad-CAM maps, float32 [N, S, S], each scaled to a maximum of 1.

        They are of class 1, or for more than two classes of each patch's predicted class. A map is
        all 0 if no part of the patch raises that class's log-odds. Takes what `predict` takes.
        """
        batches = map(np.stack, scorer.in_batches(self._patches(images), _BATCH))
        maps = (_scaled(self._explain(batch, self._mapped_classes(batch))) for batch in batches)
        side = self.config.data.patch_size
        return _concatenate(maps, np.empty((0, side, side), np.float32))

    def _mapped_classes(self, batch: np.ndarray) -> np.ndarray:
        if len(self.classes) == 2:
            return np.ones(len(batch), int)
        return _join_finite(self._predict(iter(batch)), self._scores_shape).argmax(axis=1)

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
        return scorer.make_predictor(self.config, self._variables, self._mesh)

    @functools.cached_property
    def _features(self) -> Callable:
        return scorer.make_featurizer(self.config, self._variables, self._mesh)

    @functools.cached_property
    def _explain(self) -> Callable:
        return make_explainer(self.config, self._variables)


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
        # The file was exported for one device.
        mesh = Mesh(np.array(jax.local_devices()[:1]), (sharding.AXIS,))
        network = self._network
        patches = patches_of(images, self._tiling(network.side), self.mpp)
        scores = scorer.map_patches(network.score, patches, _BATCH, mesh)
        return _join_finite(map(scorer.mean_probabilities, scores), network.shape)

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
                f"{side}; {_EXPORT_AGAIN}"
            )
        return Tiling(side, center, stride=center)

    def _refuse(self, what: str) -> NoReturn:
        raise UserError(f"{self.file}: an exported file gives {what}; load its checkpoint instead")

    @functools.cached_property
    def _network(self) -> "_Network":
        return _READERS[self.file.suffix](self.file)

    @functools.cached_property
    def _description(self) -> dict[str, Any]:
        """Returns export.json beside the file or, if there is none, the file's own metadata.

        A StableHLO file has no metadata.
        """
        return _read_description(self.file) or _read_onnx_metadata(self.file)


def _read_description(file: Path) -> dict[str, Any]:
    try:
        return read_json(file.parent / "export.json", _check_description, _EXPORT_AGAIN)
    except FileNotFoundError:
        return {}


def _check_description(found: Any) -> None:
    check_types(found, classes=list, mpp=int | float | None, files=dict)
    # Files of earlier versions have no center.
    check_types({"center": PCAM_CENTER} | found, center=int)
    if not all(isinstance(name, str) for name in found["classes"]):
        raise TypeError("classes holds something that is not a string")
    for written in found["files"].values():
        check_types(written, sha256=str | None)


def _read_onnx_metadata(file: Path) -> dict[str, Any]:
    """Returns the metadata of an ONNX file, or nothing if --mode=export did not write them."""
    if file.suffix != ".onnx":
        return {}
    said = _onnx_session(file).get_modelmeta().custom_metadata_map
    try:
        names = ("classes", "mpp", *({"center"} & said.keys()))
        # Metadata describe no files, as export.json does.
        found = {"files": {}, **{name: json.loads(said[name]) for name in names}}
        _check_description(found)
    except (KeyError, TypeError, ValueError, RecursionError):
        return {}
    return found


def _read_verified(file: Path) -> bytes:
    """Reads an exported file, and compares it with export.json beside it, if that is there."""
    try:
        with open_user_file(file) as stream:
            content = stream.read(_LARGEST + 1)
    except OSError as error:
        raise UserError(f"{file} can't be read: {reason_of(error)}") from error
    if len(content) > _LARGEST:
        raise UserError(f"{file}: is larger than any file that --mode=export writes; export again")
    written = _read_description(file).get("files", {}).get(file.name)
    # JAX's reader of a damaged file may end the process, or never return.
    if written and written["sha256"] != hashlib.sha256(content).hexdigest():
        raise UserError(f"{file}: is not what export.json beside it describes; {_EXPORT_AGAIN}")
    return content


class _Network(NamedTuple):
    """The network of an exported file."""

    score: scorer.Scorer
    side: int  # of a patch, in pixels
    shape: tuple[int, ...]  # of a patch's scores: () for log-odds, (K,) for logits of K classes


def _read_stablehlo(file: Path) -> _Network:
    content = _read_verified(file)
    try:
        exported = jax.export.deserialize(bytearray(content))
        side = int(exported.in_avals[0].shape[1])
        # Its results are (probability, log_odds), or (probability, logits).
        jitted = jax.jit(lambda images: [exported.call(images)[1]])
        shape = tuple(map(int, exported.out_avals[1].shape[1:]))
        # Lower now, so that deeper damage or a wrong program is an error here, not when it scores.
        jitted.lower(jax.ShapeDtypeStruct((1, side, side, 3), np.uint8))
    except Exception as error:  # parsers of flatbuffers and of MLIR raise many types
        raise UserError(f"{file} can't be read: {reason_of(error)}") from error
    return _Network(jitted, side, shape)


def _read_onnx(file: Path) -> _Network:
    session = _onnx_session(file)
    model_inputs = [(x.name, x.type, x.shape[1:]) for x in session.get_inputs()]
    shapes = {x.name: tuple(x.shape[1:]) for x in session.get_outputs()}
    name = "log_odds" if "log_odds" in shapes else "logits"
    side = next((shape[0] for *_, shape in model_inputs if shape), None)
    # An axis of any length has a name instead of a number.
    is_ours = all(isinstance(size, int) for size in (side, *shapes.get(name, (None,))))
    if not is_ours or model_inputs != [("image", "tensor(uint8)", [side, side, 3])]:
        raise UserError(
            f"{file}: was not written by --mode=export; give a file that was, or a run's folder"
        )

    def score(images: np.ndarray) -> list[np.ndarray]:
        return session.run([name], {"image": np.asarray(images)})

    return _Network(score, side, shapes[name])


def _onnx_session(file: Path) -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise UserError(
            f"{file}: reading it needs onnxruntime: {install_command('export')}"
        ) from error
    # Pass the content, not the path: with a path it would also read the files that the model names.
    content, options = _read_verified(file), onnxruntime.SessionOptions()
    options.log_severity_level = 4  # fatal errors only, because errors are also raised
    try:
        return onnxruntime.InferenceSession(content, options, ["CPUExecutionProvider"])
    except Exception as error:  # its types are not public
        raise UserError(f"{file} can't be read: {reason_of(error)}") from error


_READERS = {".stablehlo": _read_stablehlo, ".onnx": _read_onnx}


# ---- images -------------------------------------------------------------------------------------


def patches_of(images: Images, tiling: Tiling, mpp: float | None = None) -> Iterator[np.ndarray]:
    """Yields patches, uint8 [S, S, 3] each, of an array, an iterator of arrays, or a path.

    Args:
        tiling: how pictures that are larger than a patch are cut. All patches have its side.
        mpp: micrometres per pixel of the network; a picture that says another scale is refused.

    Raises:
        UserError: an array has another shape or type, or the path can't be read.
    """
    if isinstance(images, str | os.PathLike):
        path = user_path(images)
        inputs.check(path, None, tiling.side, mpp)
        return (patch.pixels for patch in inputs.read(path, None, tiling, mpp))
    # A single array, of NumPy, JAX or torch, has a shape. An iterable of arrays has none.
    arrays = [images] if hasattr(images, "shape") else images
    return (patch for array in arrays for patch in _checked(array, tiling.side))


def _checked(array: np.ndarray, side: int) -> np.ndarray:
    array = np.asarray(array)
    if array.dtype != np.uint8 or array.shape[1:] != (side, side, 3):
        raise UserError(
            f"images are {array.dtype} {list(array.shape)}: give uint8 [N, {side}, {side}, 3], "
            "RGB in 0 .. 255"
        )
    return array


def _scaled(maps: np.ndarray) -> np.ndarray:
    """Returns maps [n, H, W], each scaled to a maximum of 1; a map of zeros stays the same."""
    most = maps.max((1, 2), keepdims=True)
    return maps / np.where(most > 0, most, 1)


def _join_finite(parts: Iterable[np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
    """Joins probabilities, and raises `RunError` if one of them is not finite.

    Args:
        parts: [n, *shape] each.
        shape: of the probabilities of one patch.
    """
    found = _concatenate(parts, np.empty((0, *shape)))
    scorer.check_finite(found, range(len(found)))
    return found


def _concatenate(parts: Iterable[np.ndarray], empty: np.ndarray) -> np.ndarray:
    """Joins the parts; `empty` [0, ...] gives the shape and dtype if there are none."""
    return np.concatenate([empty, *parts])
