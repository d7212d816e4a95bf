"""Runs whose loss or scores are not finite: their message, and which checkpoint it calls good."""

import itertools
import re
import subprocess
import sys

import pytest

from bef_jax import train
from bef_jax.data import batches, store
from bef_jax.errors import DivergedError, RunError
from tests.conftest import SHRUNK


@pytest.mark.parametrize("sampling", ["shuffled", "balanced"])
def test_a_loss_that_is_not_finite_stops_the_run_and_names_step_and_patches(
    sampling, small_config, tmp_path
):
    fields = {"optim.name": "sgd", "optim.learning_rate": 1e38, "optim.clip_norm": 0.0}
    config = small_config(**fields, **{"data.sampling": sampling})
    message = r"loss of step (\d) is not finite; its batch: (.*); last good checkpoint: "
    with pytest.raises(FloatingPointError) as caught:
        train.train_and_evaluate(config, tmp_path)
    step, ids = re.match(f"the {message}", str(caught.value)).groups()
    split = store.open_split(store.store_path(config.data), "train")
    rows = batches.make_order(config, split.labels)(int(step) - 1)
    assert ids == ", ".join(split.ids[rows])


@pytest.mark.parametrize(("warmup", "last_good"), [(0.0, None), (1.0, "1")])
def test_a_checkpoint_is_called_good_only_if_the_next_loss_was_finite(
    warmup, last_good, small_config, tmp_path
):
    """The first step with a learning rate above 0 spoils the weights; the next loss shows it."""
    fields = {"optim.learning_rate": 1e38, "optim.warmup_epochs": warmup, "steps": 3}
    config = small_config(**fields, **{"checkpoint.every_steps": 1})
    with pytest.raises(FloatingPointError) as caught:
        train.train_and_evaluate(config, tmp_path)
    spoilt = 2 if last_good else 1  # the state after this step is spoilt
    good = tmp_path / "checkpoints" / last_good if last_good else "none"
    assert str(caught.value).startswith(f"the loss of step {spoilt + 1} is not finite; its batch: ")
    assert str(caught.value).endswith(f"; last good checkpoint: {good}")
    assert str(spoilt) in {path.name for path in (tmp_path / "checkpoints").iterdir()}


@pytest.mark.parametrize(("failing_call", "last_good"), [(1, "3"), (2, "4"), (3, "3")])
def test_scores_that_are_not_finite_end_the_run(
    failing_call, last_good, small_config, tmp_path, monkeypatch
):
    """The evaluation of step 4 or 6 fails, or that of the best checkpoint (step 4) at the end."""
    make_real_evaluator = train.make_evaluator

    def make_evaluator(*args):
        evaluate, count = make_real_evaluator(*args), itertools.count(1)

        def failing(variables, split):
            if next(count) == failing_call:
                raise RunError("the score of patch valid_3 is not finite")
            return evaluate(variables, split)

        return failing

    monkeypatch.setattr(train, "make_evaluator", make_evaluator)
    monkeypatch.setattr(train.checkpoint, "best", lambda workdir: workdir / "checkpoints" / "4")
    with pytest.raises(DivergedError) as caught:
        train.train_and_evaluate(small_config(**{"checkpoint.keep": 9}), tmp_path)
    step = {1: 4, 2: 6, 3: 4}[failing_call]
    assert str(caught.value) == (
        f"step {step}: the score of patch valid_3 is not finite; last good checkpoint: "
        f"{tmp_path / 'checkpoints' / last_good}"
    )


def test_weights_that_the_last_step_spoilt_fail_the_run_with_one_line(data_dir, tmp_path):
    fields = SHRUNK | {"data.dir": data_dir, "steps": 1, "optim.learning_rate": 1e38}
    command = [
        sys.executable, "-m", "bef_jax.main", "--config=configs/quickstart.py",
        f"--workdir={tmp_path}", *(f"--config.{name}={value}" for name, value in fields.items()),
    ]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 1, result.stderr
    assert "Traceback" not in result.stderr
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("failed: ")]
    assert line.startswith("failed: step 1: ")
    assert line.endswith("; last good checkpoint: none")
