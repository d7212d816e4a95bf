"""How long a run is: in steps, and in calls of the devices, which take one step or several."""

import dataclasses
from collections.abc import Iterator

from ml_collections import ConfigDict

from bef_jax.errors import UserError

_MOST_STEPS = 2**31 - 1  # the state counts them in an int32


@dataclasses.dataclass(frozen=True)
class Durations:
    """Steps that the configuration and the training split's size come to."""

    steps: int
    steps_per_epoch: int
    eval_steps: int


def durations(config: ConfigDict, n_train: int) -> Durations:
    """Turns epochs into steps; `config.steps` decides over `config.epochs` when it is set.

    Raises:
        UserError: the training split does not fill one batch, or the epochs come to more steps than
            the state can count.
    """
    # Whole batches: what is left over takes part in the next epoch's shuffle.
    steps_per_epoch = n_train // config.batch_size
    if not steps_per_epoch:
        raise UserError(
            f"config.batch_size={config.batch_size} exceeds the {n_train} training patches: "
            "lower it"
        )
    # At least 1: the loop takes its step modulo eval_steps, and a run of none trains nothing.
    steps = config.steps or max(1, round(config.epochs * steps_per_epoch))
    if steps > _MOST_STEPS:
        raise UserError(
            f"config.epochs={config.epochs:g} are {steps:.3g} steps: lower it, as a run takes at "
            f"most {_MOST_STEPS}"
        )
    eval_steps = max(1, round(config.eval.every_epochs * steps_per_epoch))
    return Durations(steps, steps_per_epoch, eval_steps)


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
