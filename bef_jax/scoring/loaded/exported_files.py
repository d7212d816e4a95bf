"""Reads what --mode=export wrote: a network, and the description beside it."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.export
import numpy as np

from bef_jax.data.patch import PCAM_CENTER
from bef_jax.errors import UserError, install_command, reason_of
from bef_jax.runtime.files import check_types, open_user_file, read_json
from bef_jax.scoring import scorer

_LARGEST = 400 << 20  # bytes of an exported file at most; EfficientNet-B7 has 0.3 GB
EXPORT_AGAIN = "export again, or move export.json away"


def read_description(file: Path) -> dict[str, Any]:
    """Returns export.json beside the file or, if there is none, the file's own metadata.

    A StableHLO file has no metadata.
    """
    return _read_json(file) or _read_onnx_metadata(file)


def _read_json(file: Path) -> dict[str, Any]:
    try:
        return read_json(file.parent / "export.json", _check_description, EXPORT_AGAIN)
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
    written = _read_json(file).get("files", {}).get(file.name)
    # JAX's reader of a damaged file may end the process, or never return.
    if written and written["sha256"] != hashlib.sha256(content).hexdigest():
        raise UserError(f"{file}: is not what export.json beside it describes; {EXPORT_AGAIN}")
    return content


class Network(NamedTuple):
    """The network of an exported file."""

    score: scorer.Scorer
    side: int  # of a patch, in pixels
    shape: tuple[int, ...]  # of a patch's scores: () for log-odds, (K,) for logits of K classes


def _read_stablehlo(file: Path) -> Network:
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
    return Network(jitted, side, shape)


def _read_onnx(file: Path) -> Network:
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

    return Network(score, side, shapes[name])


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


READERS: dict[str, Callable[[Path], Network]] = {".stablehlo": _read_stablehlo, ".onnx": _read_onnx}
