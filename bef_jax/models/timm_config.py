"""The config.json that timm keeps beside weights: of which network they are, and of what inputs."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from bef_jax.errors import UserError

NAME = "config.json"
# Arguments of timm's create_model that change no output of a whole network at inference.
_HARMLESS = {"num_classes", "in_chans", "drop_rate", "drop_path_rate", "pretrained"}


@dataclass(frozen=True)
class TimmConfig:
    """What it says of the weights.

    Attributes:
        architecture: timm's name of the network, such as tf_efficientnet_b0.
        mean, std: of inputs in 0 .. 1, per channel; None where it says nothing.
        arguments: of timm's create_model, which override what the architecture's name means.
    """

    architecture: str
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    arguments: Mapping = field(default_factory=dict)

    def convention(self) -> dict:
        """The fields of `config.model` that the arguments decide."""
        fields = {}
        if self.arguments.get("pad_type") in ("", "same"):
            fields["padding"] = self.arguments["pad_type"] or "symmetric"
        if self.arguments.get("bn_eps") is not None:
            fields["bn_epsilon"] = float(self.arguments["bn_eps"])
        if self.arguments.get("bn_momentum") is not None:
            # torch's momentum is the share of the new.
            fields["bn_momentum"] = 1 - float(self.arguments["bn_momentum"])
        return fields

    def not_followed(self) -> dict:
        """The arguments that make another network than ours of the same weights."""
        ours = {"pad_type": ("", "same"), "global_pool": ("avg",)}
        return {
            key: value
            for key, value in self.arguments.items()
            if key not in _HARMLESS | {"bn_eps", "bn_momentum"}
            and value is not None
            and value not in ours.get(key, ())
        }


def read(weights: Path) -> TimmConfig | None:
    """The config.json beside a file of weights; None if there is none, or it is not timm's.

    Raises:
        UserError: it is damaged, or says what can't be.
    """
    path = weights.parent / NAME
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        # Not without it: a network with padding of another kind scores, but wrongly.
        raise UserError(f"{path} is no readable JSON: fetch it again, or remove it") from error
    if not isinstance(content, dict) or not isinstance(content.get("architecture"), str):
        return None
    # Files of 2022 have all in one dict.
    trained = content.get("pretrained_cfg", content)
    arguments = content.get("model_args") or {}
    if not isinstance(trained, dict) or not isinstance(arguments, dict):
        raise UserError(f"{path}: pretrained_cfg and model_args: each must be a dict")
    mean, std = (_three(trained.get(name), name, path) for name in ("mean", "std"))
    if std and min(std) <= 0:
        raise UserError(f"{path}: std={list(std)}: give three numbers above 0")
    _check_numbers(arguments, path)
    return TimmConfig(content["architecture"].partition(".")[0], mean, std, arguments)


def _check_numbers(arguments: dict, path: Path) -> None:
    for name in ("bn_eps", "bn_momentum"):
        value = arguments.get(name)
        if value is not None and not (_is_number(value) and 0 < value < 1):
            raise UserError(f"{path}: model_args.{name}={value!r}: give a number in 0 .. 1")


def _three(value: object, name: str, path: Path) -> tuple[float, ...] | None:
    if value is None:
        return None
    if not isinstance(value, list) or len(value) != 3 or not all(map(_is_number, value)):
        raise UserError(f"{path}: {name}={value!r}: give three numbers, one for each channel")
    return tuple(map(float, value))


def _is_number(value: object) -> bool:
    # JSON has integers of any length, which no float is, and Python's reader takes NaN.
    return isinstance(value, (int, float)) and -1e9 < value < 1e9
