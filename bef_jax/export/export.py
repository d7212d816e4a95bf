"""--mode=export: turns a checkpoint into files that others run without this package.

    <workdir>/export/{model.stablehlo,model.onnx,model.safetensors,config.json,export.json}

The first two take uint8 patches, and include normalisation and the folded network, in float32. The
next two are for timm, if timm has the network: the tensors, and their description. export.json says
what input and output mean; model.onnx says it, too.
"""

import hashlib
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, export
from ml_collections import ConfigDict

from bef_jax import __version__
from bef_jax.data.patch import class_names, deciding_side
from bef_jax.data.sources.synthetic import drawn_patches
from bef_jax.errors import RunError, UserError, install_command
from bef_jax.export import timm
from bef_jax.models import create
from bef_jax.models.fold import fold_batch_norm
from bef_jax.models.weights import timm_config
from bef_jax.runtime import files, lock, sharding
from bef_jax.scoring import scorer
from bef_jax.training import checkpoint
from bef_jax.training.outputs import summary_file

PLATFORMS = ("cpu", "cuda", "tpu")  # in one file, each with its form of depthwise convolution
OUTPUTS = ("probability", "log_odds")  # of two classes; see `output_names`
DESCRIPTION = "export.json"
TOLERANCE = 1e-5  # of probabilities, compared with the network in float32 and not folded
_CHECKED = 16  # patches on which the files are compared

# Takes uint8 [n, S, S, 3], and returns what `output_names` says, float32 [n] or [n, K] each.
OutputsFn = Callable[[Array], tuple[Array, Array]]


def export_checkpoint(config: ConfigDict, workdir: Path, path: Path) -> dict:
    """Writes the files of a checkpoint; each is compared with the network before it is in place.

    Args:
        config: as `trained.scoring_config` makes it for the checkpoint.
        path: the checkpoint's folder.

    Returns:
        The summary, which export.json holds, too: mode, checkpoint, the fields of `facts`,
        platforms and files. Each file has its bytes, its sha256 and its largest difference in
        probability from the network. timm's file has all fields that `timm.write` returns.

    Raises:
        UserError: the checkpoint is damaged; config.eval.tta is not 1; a package that the files
            need is not installed; nothing can be written; or another export writes there.
        RunError: the network's scores are not finite, or an export differs from it by more than
            1e-5.
    """
    _check(config, workdir)
    with lock.held(workdir, ".export.lock"):
        everywhere = sharding.replicated(sharding.make_mesh())
        variables = checkpoint.restore_variables(path, config, everywhere)
        described = facts(config, checkpoint.read_metadata(path).get("operating_point"))
        # On the host, because the variables become constants of the files.
        written = _write_files(config, jax.device_get(variables), described, workdir / "export")
        summary = {"mode": "export", "checkpoint": str(path), **described}
        summary |= {"platforms": list(PLATFORMS), "files": written}
        files.write_json(workdir / "export" / DESCRIPTION, summary)
    return summary


def _check(config: ConfigDict, workdir: Path) -> None:
    """Raises `UserError` for mistakes that would otherwise show only after compilation."""
    if config.eval.tta != 1:
        raise UserError(f"eval.tta={config.eval.tta}: an export scores one view; give 1")
    needed = ["onnx", "onnxruntime"]
    if not timm.unsupported_reason(config.model):
        needed.append("safetensors")
    if missing := [module for module in needed if not find_spec(module)]:
        listed = " and ".join(missing)
        raise UserError(f"--mode=export needs {listed}: {install_command('export')}")
    names = ("model.stablehlo", "model.onnx", timm.FILE, timm_config.NAME, DESCRIPTION)
    written = [summary_file(workdir, "export").name, *(f"export/{name}" for name in names)]
    files.check_outputs(workdir, written, ["export"])


def output_names(classes: int) -> tuple[str, str]:
    """Returns the names of a file's outputs: probability, and what it is computed from."""
    return OUTPUTS if classes == 2 else ("probability", "logits")


def facts(config: ConfigDict, operating_point: dict | None) -> dict[str, Any]:
    """Returns the facts that a server needs about an exported network.

    A fact that is not known is None.

    Args:
        operating_point: temperature and threshold that the run chose on valid, or None.
    """
    side, classes = config.data.patch_size, class_names(config)
    is_binary = len(classes) == 2
    shape = ["n"] if is_binary else ["n", len(classes)]
    mean, std = (list(config.augment[name]) for name in ("mean", "std"))
    return {
        "version": __version__,
        "model": config.model.name,
        "input": {
            "name": "image",
            "shape": ["n", side, side, 3],
            "dtype": "uint8",
            "layout": "NHWC",
            "channels": "RGB",
            "range": [0, 255],
        },
        "outputs": {
            name: {"shape": shape, "dtype": "float32"} for name in output_names(len(classes))
        },
        "center": config.rcc.center,
        "stride": deciding_side(config),
        "classes": list(classes),
        "mpp": config.data.mpp or None,
        "threshold": config.eval.threshold if is_binary else None,
        "temperature": 1.0,
        "operating_point": operating_point,
        "normalisation": {"mean": mean, "std": std, "where": "inside the file"},
        "meaning": {
            **(_meaning_of_two(*classes) if is_binary else _MEANING_OF_MANY),
            "center": "side of the square in the middle of a patch that decides its class, in "
            "pixels; 0: the whole patch decides",
            "stride": "pixels from one patch to the next, so that each place of a slide is decided "
            "once",
            "mpp": "micrometres per pixel of the patches that the network learned from",
            "operating_point": "temperature and threshold chosen on the validation split; the "
            "file's own probability uses the temperature above",
            "normalisation": "(input / 255 - mean) / std; the file does it",
        },
    }


def _meaning_of_two(negative: str, positive: str) -> dict[str, str]:
    return {
        "probability": f"of class 1, {positive}: sigmoid(log_odds / temperature)",
        "log_odds": f"of class 1, {positive}, over class 0, {negative}",
        "threshold": f"class 1, {positive}, is the decision where probability >= threshold",
    }


_MEANING_OF_MANY = {
    "probability": "of each class, in the order of classes: softmax(logits / temperature)",
    "logits": "of each class, in the order of classes",
    "threshold": "there is none; the class with the largest probability is the decision",
}


def _write_files(config: ConfigDict, variables: dict, described: dict, folder: Path) -> dict:
    folder.mkdir(parents=True, exist_ok=True)
    outputs_fn = folded_outputs_fn(config, variables)
    images = drawn_patches(config.data.patch_size, _CHECKED)
    expected, scores = jax.jit(_outputs_fn(create(config.model), config, variables))(images)
    if not np.isfinite(scores).all():
        raise RunError("the network's scores are not finite: export an earlier checkpoint")

    spec = patches_spec(config.data.patch_size)
    content = to_stablehlo(outputs_fn, spec)
    actual = jax.jit(export.deserialize(bytearray(content)).call)(images)[0]
    written = {"model.stablehlo": _place(folder / "model.stablehlo", content, actual, expected)}
    # Imported here, because these packages are an extra.
    import onnxruntime

    from bef_jax.models.onnx.graph import to_onnx

    content = to_onnx(outputs_fn, spec, output_names(config.model.num_classes), described)
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    actual = session.run(None, {"image": images})[0]
    written["model.onnx"] = _place(folder / "model.onnx", content, actual, expected)
    written[timm.FILE] = timm.write(config, variables, folder)
    return written


def _place(file: Path, content: bytes, actual: Array, expected: Array) -> dict:
    """Writes a file, whole or not at all, if it agrees with the network; returns its entry."""
    difference = float(np.abs(np.asarray(actual) - np.asarray(expected)).max())
    if not difference <= TOLERANCE:  # so that NaN fails, too
        raise RunError(
            f"{file.name} differs from the network by {difference}, so it is not written"
        )
    files.write_bytes(file, content)
    digest = hashlib.sha256(content).hexdigest()
    return {"bytes": len(content), "sha256": digest, "max_difference": difference}


def patches_spec(side: int) -> jax.ShapeDtypeStruct:
    """Returns the argument of an export: [n, side, side, 3], uint8, where n is symbolic."""
    return jax.ShapeDtypeStruct(export.symbolic_shape(f"n, {side}, {side}, 3"), jnp.uint8)


def to_stablehlo(outputs_fn: OutputsFn, spec: jax.ShapeDtypeStruct) -> bytes:
    """Returns one file for all of PLATFORMS; `jax.export.deserialize` reads it.

    Args:
        spec: the argument of the function, of `patches_spec`.
    """
    return bytes(export.export(jax.jit(outputs_fn), platforms=PLATFORMS)(spec).serialize())


def folded_outputs_fn(config: ConfigDict, variables: dict) -> OutputsFn:
    """Returns the function that is exported, with batch normalisation in the convolutions."""
    model = create(config.model, folded=True)
    return _outputs_fn(model, config, fold_batch_norm(variables, config.model.bn_epsilon))


def _outputs_fn(model: nn.Module, config: ConfigDict, variables: dict) -> OutputsFn:
    def outputs(images: Array) -> tuple[Array, Array]:
        scores = scorer.view_scores(model, config, variables, images, view=0)
        to_probability = jax.nn.sigmoid if config.model.num_classes == 2 else jax.nn.softmax
        # In float32 the most confident patches all have probability 1; their scores still differ.
        return to_probability(scores), scores

    return outputs
