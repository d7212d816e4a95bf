"""Calls of the devices: each takes one training step, or several in one program."""

from collections.abc import Iterator

from ml_collections import ConfigDict

from bef_jax.config import Durations
from bef_jax.errors import UserError


def call_sizes(config: ConfigDict, spans: Durations, start: int) -> Iterator[int]:
    """Yields how many steps each call takes, from step `start` to the end.

    No call goes past an evaluation, a save or the end: where `config.steps_per_call` steps would,
    single ones lead there. So two programs do for all calls.
    """
    step, most = start, config.steps_per_call
    periods = spans.eval_steps, config.checkpoint.every_steps
    while step < spans.steps:
        # To whatever comes next: the end, an evaluation, a save.
        ahead = min(spans.steps - step, *(period - step % period for period in periods))
        # 1, not `ahead`: each length is a program of its own to compile.
        size = most if most <= ahead else 1
        yield size
        step += size


def check_placement(config: ConfigDict, placed: bool) -> None:
    """Raises `UserError` if a call is to take several steps, and their batches come from the host.

    Args:
        placed: whether the devices hold the training split.
    """
    if config.steps_per_call > 1 and not placed:
        raise UserError(
            f"config.steps_per_call={config.steps_per_call} needs the training split on the "
            f"devices, and config.data.placement={config.data.placement} leaves it on the host: "
            "set config.data.placement=device or config.steps_per_call=1"
        )
