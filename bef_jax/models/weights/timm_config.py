"""Reads the config.json that timm keeps beside weights, about their network and its inputs."""

import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from typing import Any

from bef_jax.runtime.files import read_json

NAME = "config.json"
_LONGEST_NAME = 100  # characters of an architecture
# Arguments of timm's create_model that need no warning: they change nothing at inference, or the
# tensors' shapes show them.
_HARMLESS = {"num_classes", "in_chans", "drop_rate", "drop_path_rate", "pretrained"}


@dataclass(frozen=True)
class TimmConfig:
    """The facts that a config.json gives about the weights beside it.

    Attributes:
        architecture: timm's name of the network, such as tf_efficientnet_b0.
        mean, std: per channel, of inputs in 0 .. 1; None where the file does not say.
        arguments: those of timm's create_model; they override what the architecture's name means.
    """

    architecture: str
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    arguments: Mapping = field(default_factory=dict)

    def convention(self) -> dict:
        """Returns the fields of `config.model` that the arguments decide."""
        fields = {}
        if self.arguments.get("pad_type") in ("", "same"):
            fields["padding"] = self.arguments["pad_type"] or "symmetric"
        if self.arguments.get("bn_eps") is not None:
            fields["bn_epsilon"] = float(self.arguments["bn_eps"])
        if self.arguments.get("bn_momentum") is not None:
            # torch's momentum is the weight of the new value; ours is that of the old.
            fields["bn_momentum"] = 1 - float(self.arguments["bn_momentum"])
        return fields

    def normalisation(self) -> dict:
        """Returns the fields of `config.augment` that the file states."""
        fields = {"mean": self.mean, "std": self.std}
        return {field: value for field, value in fields.items() if value}

    def ignored_arguments(self) -> dict:
        """Returns the arguments that may make timm's network differ, although weights are equal."""
        ours = {"pad_type": ("", "same"), "global_pool": ("avg",)}
        return {
            key: value
            for key, value in self.arguments.items()
            if key not in _HARMLESS | {"bn_eps", "bn_momentum"}
            and value is not None
            and value not in ours.get(key, ())
        }


def read(weights: Path) -> TimmConfig | None:
    """Returns the content of the config.json beside weights; None if it is missing or not timm's.

    Raises:
        UserError: it is not a regular file, is damaged, or has values that are not possible.
    """
    try:
        # A damaged file is not ignored, because a network with another padding gives wrong scores.
        fix = "fetch it again; if you remove it, the padding may be wrong"
        content = read_json(weights.parent / NAME, _check, fix)
    except FileNotFoundError:
        return None
    if not _is_from_timm(content):
        return None
    trained, arguments = _parts(content)
    mean, std = (trained.get(name) and tuple(map(float, trained[name])) for name in ("mean", "std"))
    return TimmConfig(content["architecture"].partition(".")[0], mean, std, arguments)


def _is_from_timm(content: Any) -> bool:
    return isinstance(content, dict) and isinstance(content.get("architecture"), str)


def _parts(content: dict) -> tuple[dict, dict]:
    """Returns the settings of pretraining, and the arguments of create_model."""
    # Files from 2022 have everything in one dict.
    return content.get("pretrained_cfg", content), content.get("model_args") or {}


def _check(content: Any) -> None:
    if not _is_from_timm(content):
        return
    if len(content["architecture"]) > _LONGEST_NAME:
        raise ValueError("architecture is too long: give the name of a network")
    trained, arguments = _parts(content)
    if not isinstance(trained, dict) or not isinstance(arguments, dict):
        raise ValueError("pretrained_cfg and model_args: each must be a dict")
    for name, least in (("mean", -inf), ("std", 0)):
        value = trained.get(name)
        if value is not None and not _are_three_numbers_above(value, least):
            above = " above 0" if name == "std" else ""
            raise ValueError(f"{name}={reprlib.repr(value)}: give three numbers{above}")
    for name in ("bn_eps", "bn_momentum"):
        value = arguments.get(name)
        if value is not None and not (_is_number(value) and 0 < value < 1):
            raise ValueError(f"model_args.{name}={reprlib.repr(value)}: give a number in 0 .. 1")


def _are_three_numbers_above(value: Any, least: float) -> bool:
    is_three = isinstance(value, list) and len(value) == 3
    return is_three and all(_is_number(each) and each > least for each in value)


def _is_number(value: Any) -> bool:
    # JSON allows integers that are too large for a float, and Python's reader accepts NaN.
    return isinstance(value, int | float) and not isinstance(value, bool) and -1e9 < value < 1e9
