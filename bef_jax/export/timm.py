"""Writes a checkpoint in timm's format: model.safetensors, and config.json beside it."""

import hashlib
import os
import tempfile
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from bef_jax.data.patch import class_names, eval_side
from bef_jax.errors import RunError
from bef_jax.models import stages, weights
from bef_jax.models.weights import timm_config
from bef_jax.models.weights.parameter_names import TIMM, of_timm, recognise
from bef_jax.runtime.files import write_bytes, write_json

FILE = "model.safetensors"


def write(config: ConfigDict, variables: dict, folder: Path) -> dict:
    """Writes both files if timm has the network, and checks them by reading them back.

    Args:
        variables: {params, batch_stats} of numpy arrays, not folded.

    Returns:
        The file's architecture (timm's name of the network), bytes, sha256, largest difference in
        probability, and a note or None. If no file is written, the note says why, and all others
        are None.

    Raises:
        RunError: what is read back differs from what was written.
    """
    if reason := unsupported_reason(config.model):
        # Files of an earlier export would be of another network.
        for name in (FILE, timm_config.NAME):
            (folder / name).unlink(missing_ok=True)
        empty_entry = dict.fromkeys(("architecture", "bytes", "sha256", "max_difference"))
        return empty_entry | {"note": reason}
    content = _safetensors(config, variables)
    features = len(variables["params"]["classifier"]["kernel"])
    # Both are read back as a pair, because config.json says what the tensors mean.
    with tempfile.TemporaryDirectory(prefix=".timm_", dir=folder) as name:
        temporary = Path(name)
        write_bytes(temporary / FILE, content)
        write_json(temporary / timm_config.NAME, _config_json(config, features))
        _check(config.model, variables, temporary / FILE)
        for file in (FILE, timm_config.NAME):
            os.replace(temporary / file, folder / file)
    return {
        "architecture": _architecture(config.model),
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
        "max_difference": 0.0,  # the tensors are the same
        "note": _note(config.model),
    }


def unsupported_reason(model: ConfigDict) -> str | None:
    """Returns the reason why timm has no place for the network; None if it has one."""
    source = of_timm(model.name)
    if source is None:
        return f"timm has no {model.name}"
    boosts = {"attention": model.attention != "none", "fusion": model.fusion}
    if any(boosts.values()):
        return f"timm has no place for {' and '.join(name for name, on in boosts.items() if on)}"
    # timm's EfficientNets take both kinds of padding, and any epsilon.
    padding, epsilon = source.padding, source.bn_epsilon
    if source is not TIMM and (model.padding, model.bn_epsilon) != (padding, epsilon):
        return f"timm's {model.name} has padding={padding} and bn_epsilon={epsilon:g} only"
    return None


def _note(model: ConfigDict) -> str | None:
    if model.total_stride == 32:
        return None
    return f"timm's network has total stride 32, not {model.total_stride}, so its scores differ"


def _architecture(model: ConfigDict) -> str:
    return f"tf_{model.name}" if model.padding == "same" else model.name


def _safetensors(config: ConfigDict, variables: dict) -> bytes:
    import safetensors.numpy  # imported here, because it is an extra

    # "pt" stands for torch's names and layouts; readers of the format expect it.
    metadata = {"format": "pt", "total_stride": str(config.model.total_stride)}
    # safetensors' own writer is not used, because it makes files that only the user can read.
    return safetensors.numpy.save(weights.to_timm(variables, config.model), metadata)


def _config_json(config: ConfigDict, features: int) -> dict:
    """Returns the content of config.json; timm ignores fields that it does not know."""
    model, source = config.model, of_timm(config.model.name)
    side = eval_side(config)
    ends = {"first_conv": "stem/kernel", "classifier": "classifier/kernel"}
    # timm's name for them. The files of two classes have always been without.
    names = {"label_names": list(class_names(config))} if model.num_classes > 2 else {}
    return {
        "architecture": _architecture(model),
        "num_classes": model.num_classes,
        **names,
        "num_features": features,
        "global_pool": "avg",
        "model_args": _arguments(model),
        "total_stride": model.total_stride,
        "pretrained_cfg": {
            "num_classes": model.num_classes,
            "input_size": [3, side, side],
            "pool_size": None,
            "crop_pct": 1.0,
            "mean": list(config.augment.mean),
            "std": list(config.augment.std),
            **{
                name: source.translate(end, stages(model.name)).removesuffix(".weight")
                for name, end in ends.items()
            },
        },
    }


def _arguments(model: ConfigDict) -> dict:
    """Returns create_model's arguments where the architecture implies another batch norm."""
    source = of_timm(model.name)
    implied = recognise([source.marker], _architecture(model), model.name)
    arguments = {}
    if model.bn_epsilon != implied.bn_epsilon:
        arguments["bn_eps"] = model.bn_epsilon
    # timm's other networks take neither argument.
    if source is TIMM and model.bn_momentum != implied.bn_momentum:
        arguments["bn_momentum"] = round(1 - model.bn_momentum, 9)
    return arguments


def _check(model: ConfigDict, variables: dict, file: Path) -> None:
    found = weights.read(file, model)
    same = jax.tree.map(np.array_equal, found.variables, variables)
    fields = ("padding", "bn_epsilon")
    if not jax.tree.all(same) or any(found.convention[field] != model[field] for field in fields):
        raise RunError(
            f"{file.name} reads back differently from what was written, so it is not kept"
        )
