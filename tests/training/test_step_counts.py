"""Counts of steps, and the sizes of calls, against numbers worked out by hand."""

import itertools

import pytest

from bef_jax.configs.default import get_config
from bef_jax.errors import UserError
from bef_jax.training.step_counts import StepCounts, call_sizes, check_placement, count_steps


def config_with(**fields):
    config = get_config()
    config.update_from_flattened_dict(fields)
    return config


@pytest.mark.parametrize("start", [0, 1, 6, 29])
@pytest.mark.parametrize("steps_per_call", [1, 2, 4, 7])
@pytest.mark.parametrize(("steps_per_eval", "every_steps"), [(5, 8), (8, 4), (1, 3), (100, 100)])
def test_calls_end_at_every_evaluation_and_save(start, steps_per_call, steps_per_eval, every_steps):
    counts = StepCounts(steps=30, steps_per_epoch=10, steps_per_eval=steps_per_eval)
    fields = {"steps_per_call": steps_per_call, "checkpoint.every_steps": every_steps}
    sizes = list(call_sizes(config_with(**fields), counts, start))
    ends = set(itertools.accumulate(sizes, initial=start))
    events = {
        step for step in range(start, 31) if not (step % steps_per_eval and step % every_steps)
    }
    assert events | {start, 30} <= ends
    assert max(ends) == 30
    assert set(sizes) <= {1, steps_per_call}


def test_calls_are_as_long_as_possible():
    counts = StepCounts(steps=23, steps_per_epoch=10, steps_per_eval=10)
    sizes = list(call_sizes(config_with(steps_per_call=4), counts, 0))
    assert sizes == [4, 4, 1, 1, 4, 4, 1, 1, 1, 1, 1]


def test_a_run_at_its_end_makes_no_call():
    counts = StepCounts(steps=30, steps_per_epoch=10, steps_per_eval=10)
    assert list(call_sizes(config_with(steps_per_call=4), counts, 30)) == []


def test_several_steps_per_call_are_refused_if_data_are_on_the_host():
    with pytest.raises(UserError, match=r"config.steps_per_call=2 .*config.data.placement=auto "):
        check_placement(config_with(steps_per_call=2), placed=False)
    check_placement(config_with(steps_per_call=2), placed=True)
    check_placement(config_with(steps_per_call=1), placed=False)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, (150, 15, 15)),
        ({"epochs": 0.5, "eval.every_epochs": 0.2}, (8, 15, 3)),
        ({"epochs": 3, "steps": 7}, (7, 15, 15)),
        ({"epochs": 0.001, "eval.every_epochs": 0.001}, (1, 15, 1)),
        ({"batch_size": 1000}, (10, 1, 1)),
    ],
)
def test_step_counts_match_those_worked_out_by_hand(fields, expected):
    counts = count_steps(config_with(**fields), 1000)
    assert (counts.steps, counts.steps_per_epoch, counts.steps_per_eval) == expected


def test_a_split_smaller_than_a_batch_is_refused():
    with pytest.raises(UserError, match=r"config\.batch_size=64 exceeds the 63 training patches"):
        count_steps(get_config(), 63)
    assert count_steps(get_config(), 64).steps_per_epoch == 1


def test_epochs_with_more_steps_than_the_state_can_count_are_refused():
    with pytest.raises(UserError, match=r"config\.epochs=1e\+09 are 1\.5e\+10 steps: lower it"):
        count_steps(config_with(epochs=1e9), 1000)
    assert count_steps(config_with(epochs=1e9, steps=7), 1000).steps == 7
    counts = count_steps(config_with(**{"eval.every_epochs": 1e30}), 1000)
    assert counts.steps_per_eval > counts.steps
