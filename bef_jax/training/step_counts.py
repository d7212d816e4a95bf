"""The length of a run: in steps, and in calls of the devices, which take one or more steps."""

import dataclasses
from collections.abc import Iterator

from ml_collections import ConfigDict

from bef_jax.configs.fields import MOST_INT
from bef_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class StepCounts:
    """Numbers of steps, from the configuration and the size of the training split."""

    steps: int
    steps_per_epoch: int
    steps_per_eval: int


def count_steps(config: ConfigDict, n_train: int) -> StepCounts:
    """Turns epochs into steps; `config.steps` overrides `config.epochs` if it is set.

    Raises:
        UserError: the training split does not fill one batch, or the epochs have more steps than
            the state can count.
    """
    # Count whole batches only. The next epoch shuffles all patches again, also those left over.
    steps_per_epoch = n_train // config.batch_size
    if not steps_per_epoch:
        raise UserError(
            f"config.batch_size={config.batch_size} exceeds the {n_train} training patches: "
            "lower it"
        )
    # steps and steps_per_eval are at least 1: a run of 0 steps trains nothing, and the loop takes
    # step % steps_per_eval.
    steps = config.steps or max(1, round(config.epochs * steps_per_epoch))
    if steps > MOST_INT:
        raise UserError(
            f"config.epochs={config.epochs:g} are {steps:.3g} steps: lower it, because a run takes "
            f"at most {MOST_INT}"
        )
    steps_per_eval = max(1, round(config.eval.every_epochs * steps_per_epoch))
    return StepCounts(steps, steps_per_epoch, steps_per_eval)


def call_sizes(config: ConfigDict, counts: StepCounts, start: int) -> Iterator[int]:
    """Yields how many steps each call takes, from step `start` to the end.

    No call goes past an evaluation, a save or the end. Where `config.steps_per_call` steps would go
    past one, the calls take single steps. So two programs are enough for all calls.
    """
    step, most = start, config.steps_per_call
    periods = counts.steps_per_eval, config.checkpoint.every_steps
    while step < counts.steps:
        # Count the steps to what comes first: the end, an evaluation or a save.
        ahead = min(counts.steps - step, *(period - step % period for period in periods))
        # Take 1, not `ahead`, because each size is another program to compile.
        size = most if most <= ahead else 1
        yield size
        step += size


def check_placement(config: ConfigDict, placed: bool) -> None:
    """Raises `UserError` if calls take several steps, but their batches come from the host.

    Args:
        placed: whether the devices hold the training split.
    """
    if config.steps_per_call > 1 and not placed:
        raise UserError(
            f"config.steps_per_call={config.steps_per_call} needs the training split on the "
            f"devices, and config.data.placement={config.data.placement} leaves it on the host: "
            "set config.data.placement=device or config.steps_per_call=1"
        )
