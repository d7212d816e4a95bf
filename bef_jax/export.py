"""--mode=export: a checkpoint becomes files that others run without this package.

    <workdir>/export/{model.stablehlo,model.onnx,model.safetensors,config.json,export.json}

The first two take uint8 patches and carry normalisation and the folded network, in float32. The
next two are timm's, where it has the network: its tensors, and what it should know of them.
"""

import hashlib
import os
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, export, lax
from ml_collections import ConfigDict

from bef_jax import checkpoint, export_timm, sharding, trained
from bef_jax.data import augment, synthetic
from bef_jax.data.patch import class_names, mpp
from bef_jax.errors import RunError, UserError
from bef_jax.models import create
from bef_jax.models.fold import fold_batch_norm
from bef_jax.runtime.files import write_json

PLATFORMS = ("cpu", "cuda", "tpu")  # in one file; depthwise convolution in its form or the native
OUTPUTS = ("probability", "log_odds")
TOLERANCE = 1e-5  # of probabilities, against the network as it was trained
_CHECKED = 16  # patches that the files are compared on

Score = Callable[[Array], tuple[Array, Array]]


def run(config: ConfigDict, workdir: Path, path: Path) -> dict:
    """Writes the files of a checkpoint, each checked against the network before it is in place.

    Args:
        config: as `trained.scoring_config` makes it for the checkpoint.
        path: the checkpoint's folder.

    Returns:
        The summary: mode, checkpoint, model, input, outputs, classes, mpp, threshold, temperature,
        normalisation, platforms, operating_point (what the run chose on valid, or None) and, for
        each file, its bytes, sha256 and largest difference in probability from the network; for
        timm's also what `export_timm.write` says.

    Raises:
        UserError: the checkpoint is damaged; config.eval.tta is not 1; or what ONNX or timm's
            file takes is not installed, once the others are written.
        RunError: an export differs from the network by more than 1e-5.
    """
    if config.eval.tta != 1:
        raise UserError(f"eval.tta={config.eval.tta}: an export scores one view; give 1")
    everywhere = sharding.replicated(sharding.make_mesh())
    variables = trained.restore_variables(path, config, everywhere)
    folder = workdir / "export"
    folder.mkdir(parents=True, exist_ok=True)
    # Off the devices: they become constants of the files.
    files = _write_files(config, jax.device_get(variables), folder)
    chosen = {"operating_point": checkpoint.read_run(path).get("operating_point")}
    summary = {"mode": "export", "checkpoint": str(path), **_describe(config), **chosen}
    summary["files"] = files
    write_json(folder / "export.json", summary)
    return summary


def _describe(config: ConfigDict) -> dict:
    """What a server needs to know."""
    side = augment.PATCH
    return {
        "model": config.model.name,
        "input": {"name": "image", "shape": ["n", side, side, 3], "dtype": "uint8"},
        "outputs": {name: {"shape": ["n"], "dtype": "float32"} for name in OUTPUTS},
        "classes": list(class_names(config)),
        "mpp": mpp(config),
        "threshold": config.eval.threshold,
        "temperature": 1.0,
        # Inside the files; here for whoever asks.
        "normalisation": {"mean": list(config.augment.mean), "std": list(config.augment.std)},
        "platforms": list(PLATFORMS),
    }


def _write_files(config: ConfigDict, variables: dict, folder: Path) -> dict:
    score = folded_score(config, variables)
    # Drawn tissue, not noise: of noise a trained network is sure, and files that differ agree.
    images = next(synthetic.generate("test", _CHECKED, seed=0)).images
    expected = jax.jit(_plain_score(config, variables))(images)[0]

    content = to_stablehlo(score)
    actual = jax.jit(export.deserialize(bytearray(content)).call)(images)[0]
    files = {"model.stablehlo": _place(folder / "model.stablehlo", content, actual, expected)}
    if not (find_spec("onnx") and find_spec("onnxruntime")):
        raise UserError(f"{folder}/model.stablehlo is written; ONNX takes pip install -e .[export]")
    # Here, as these packages are an extra.
    import onnxruntime

    from bef_jax.onnx_graph import to_onnx

    content = to_onnx(score, patches(), OUTPUTS)
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    actual = session.run(None, {"image": images})[0]
    files["model.onnx"] = _place(folder / "model.onnx", content, actual, expected)
    files[export_timm.FILE] = export_timm.write(config, variables, folder)
    return files


def _place(file: Path, content: bytes, actual: Array, expected: Array) -> dict:
    """Writes what agrees with the network, whole or not at all, and describes it."""
    difference = float(np.abs(np.asarray(actual) - np.asarray(expected)).max())
    if not difference <= TOLERANCE:  # NaN is no agreement
        raise RunError(f"{file.name} differs from the network by {difference}: not written")
    temporary = file.with_name(f".{file.name}.tmp")
    temporary.write_bytes(content)
    os.replace(temporary, file)
    digest = hashlib.sha256(content).hexdigest()
    return {"bytes": len(content), "sha256": digest, "max_difference": difference}


def patches() -> jax.ShapeDtypeStruct:
    """The argument of an export: [n, 96, 96, 3], uint8, n symbolic."""
    return jax.ShapeDtypeStruct(
        export.symbolic_shape(f"n, {augment.PATCH}, {augment.PATCH}, 3"), jnp.uint8
    )


def to_stablehlo(score: Score) -> bytes:
    """One file for all of PLATFORMS; `jax.export.deserialize` reads it."""
    return bytes(export.export(jax.jit(score), platforms=PLATFORMS)(patches()).serialize())


def folded_score(config: ConfigDict, variables: dict) -> Score:
    """Returns `score(images)`, as eval's: uint8 [n, 96, 96, 3] -> probability and log-odds, [n]."""
    model = create(config.model, folded=True)
    return _score(model, config, fold_batch_norm(variables, config.model.bn_epsilon))


def _plain_score(config: ConfigDict, variables: dict) -> Score:
    """Likewise, of the network as it was trained."""
    return _score(create(config.model), config, variables)


def _score(model, config: ConfigDict, variables: dict) -> Score:
    def score(images: Array) -> tuple[Array, Array]:
        logits = model.apply(variables, augment.eval_view(images, config), train=False)
        # Not logits[:, 1], which is a gather where n is symbolic.
        negative, positive = (lax.index_in_dim(logits, i, 1, keepdims=False) for i in (0, 1))
        log_odds = positive - negative
        # In float32 the surest patches all have probability 1, and tie: log-odds do not.
        return jax.nn.sigmoid(log_odds), log_odds

    return score
