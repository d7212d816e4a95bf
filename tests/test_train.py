import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from bef_jax import train
from bef_jax.cli import config_files
from bef_jax.data import store
from bef_jax.data.batches import Batch
from bef_jax.errors import UserError
from bef_jax.training import checkpoint, outputs
from bef_jax.training.step import make_train_step
from tests.conftest import SHRUNK

KEYS = {
    "mode", "step", "epoch", "wall_seconds", "compile_seconds", "images_per_second",
    "input_wait_fraction", "params", "params_digest", "best_step", "valid", "test",
}  # fmt: skip
EVAL_KEYS = {
    "split", "n", "loss", "accuracy", "auc", "auc_ci95", "sensitivity", "specificity", "f1",
    "brier", "ece", "threshold", "tta",
    "average_precision", "ci95", "calibrated", "operating_point",
}  # fmt: skip


@pytest.fixture(scope="module")
def finished_folder(tmp_path_factory):
    """An empty folder for the run of `undisturbed`."""
    return tmp_path_factory.mktemp("finished")


@pytest.fixture
def undisturbed(finished_folder, small_config):
    """The workdir of a finished run, and its summary; trained once for all tests."""
    summary = finished_folder / "summary.json"
    if not summary.exists():
        summary.write_text(
            json.dumps(train.train_and_evaluate(small_config(), finished_folder / "run"))
        )
    return finished_folder / "run", json.loads(summary.read_text())


def stop_before(monkeypatch, step, signum=signal.SIGTERM):
    """Sends this process a real signal just before the call that takes step `step`."""
    original = train.compile_step

    def compile_step(*args):
        compiled = original(*args)

        def step_fn(state, call_input, *others):
            # A Batch is the input of one step, a Selection that of len(indices) steps.
            steps = len(call_input.indices) if hasattr(call_input, "indices") else 1
            if int(state.step) < step <= int(state.step) + steps:
                os.kill(os.getpid(), signum)
            return compiled(state, call_input, *others)

        step_fn.memory_analysis = compiled.memory_analysis
        return step_fn

    monkeypatch.setattr(train, "compile_step", compile_step)


def test_summary_and_files(undisturbed):
    workdir, summary = undisturbed
    assert set(summary) == KEYS
    assert set(summary["valid"]) == set(summary["test"]) == EVAL_KEYS
    assert (summary["step"], summary["epoch"]) == (6, 6 / 5)
    assert (summary["valid"]["n"], summary["test"]["n"]) == (21, 13)
    for name in ("config.json", "metrics.jsonl", "report/index.html", "report/loss.png"):
        assert (workdir / name).stat().st_size > 0
    assert list((workdir / "tensorboard").iterdir())
    # The outputs that are checked before a run are exactly those that it writes.
    names = {path.name for path in workdir.iterdir()} - {".lock"}
    assert names | {"train_summary.json"} == {*outputs.FILES, *outputs.FOLDERS}
    plots = ("loss", "validation", "roc", "precision_recall", "reliability", "most_wrong")
    found = {path.name for path in (workdir / "report").iterdir()}
    assert found == {"index.html", *(f"{name}.png" for name in plots)} < {*outputs.REPORT}


@pytest.mark.smoke
def test_best_checkpoint_is_kept_and_evaluated(undisturbed):
    workdir, summary = undisturbed
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    aucs = {line["step"]: line["valid_auc"] for line in lines if "valid_auc" in line}
    assert sorted(aucs) == [4, 6]
    assert summary["valid"]["auc"] == max(aucs.values())
    assert aucs[summary["best_step"]] == max(aucs.values())
    assert checkpoint.best(workdir).name == str(summary["best_step"])


def test_logs_every_step_once_with_its_learning_rate(undisturbed):
    workdir, _ = undisturbed
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines if "loss" in line]
    rates = [line["learning_rate"] for line in lines if "loss" in line]
    assert steps == [1, 2, 3, 4, 5, 6]
    # A warm-up of two steps to the peak, then half a cosine to a hundredth of it at step 6.
    peak = 0.012 * 8 / 256
    cosine = [0.01 + 0.99 * (1 + math.cos(math.pi * step / 4)) / 2 for step in range(4)]
    assert rates == pytest.approx([0.0, peak / 2, *(peak * x for x in cosine)])


def test_finished_run_returns_the_same_summary(undisturbed, small_config, tmp_path, monkeypatch):
    workdir, summary = undisturbed
    again = tmp_path / "again"
    shutil.copytree(workdir, again)
    monkeypatch.setattr(train, "compile_step", lambda *_: pytest.fail("trained again"))
    assert train.train_and_evaluate(small_config(), again) == summary


def test_the_loss_has_the_weights_of_the_training_split(small_config, tmp_path, monkeypatch):
    class Stop(Exception):
        """Ends the run at its first step."""

    def step_fn(state, call_input, key, rates, weights):
        raise Stop(weights)

    config = small_config(**{"data.class_weights": "balanced"})
    monkeypatch.setattr(train, "compile_step", lambda *_: step_fn)
    monkeypatch.setattr(train, "describe", lambda *_: None)
    with pytest.raises(Stop) as caught:
        train.train_and_evaluate(config, tmp_path)
    labels = store.open_split(store.store_path(config.data), "train").labels
    expected = [len(labels) / (2 * np.sum(labels == label)) for label in (0, 1)]
    np.testing.assert_allclose(caught.value.args[0], expected)


@pytest.mark.parametrize(
    ("step", "signum"),  # before a save, at one, at an evaluation, and after it
    [
        (1, signal.SIGINT),
        (3, signal.SIGTERM),
        (4, signal.SIGINT),
        pytest.param(5, signal.SIGTERM, marks=pytest.mark.smoke),
    ],
)
def test_stopped_and_resumed_is_the_undisturbed_run(
    step, signum, undisturbed, small_config, tmp_path, monkeypatch
):
    _, expected = undisturbed
    with monkeypatch.context() as patch:
        stop_before(patch, step, signum)
        stopped = train.train_and_evaluate(small_config(), tmp_path)
    assert (stopped["step"], stopped["valid"]) == (step, None)
    resumed = train.train_and_evaluate(small_config(), tmp_path)
    assert resumed["params_digest"] == expected["params_digest"]
    assert resumed["valid"] == expected["valid"]
    history = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in history if "loss" in line] == [1, 2, 3, 4, 5, 6]


def test_killed_run_goes_on_from_the_last_save(undisturbed, small_config, tmp_path, monkeypatch):
    _, expected = undisturbed

    class Killed(Exception):
        pass

    def kill(*_):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(signal, "Signals", kill)  # the handler calls it for its log line
        stop_before(patch, 5)
        with pytest.raises(Killed):
            train.train_and_evaluate(small_config(), tmp_path)
    assert checkpoint.read_metadata(tmp_path / "checkpoints" / "4")["clock"]["wall"] > 0
    resumed = train.train_and_evaluate(small_config(), tmp_path)
    assert resumed["params_digest"] == expected["params_digest"]


def test_a_process_stopped_by_a_signal_exits_0_and_resumes(undisturbed, data_dir, tmp_path):
    _, expected = undisturbed
    fields = {**SHRUNK, "data.dir": data_dir}
    command = [
        sys.executable, "-m", "bef_jax.main", "--config=configs/quickstart.py",
        f"--workdir={tmp_path}", *(f"--config.{name}={value}" for name, value in fields.items()),
    ]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 300
    while not (tmp_path / "metrics.jsonl").exists() and time.monotonic() < deadline:
        assert process.poll() is None, process.returncode
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    stopped = json.loads(process.communicate()[0].splitlines()[-1])
    assert process.returncode == 0
    assert stopped["step"] >= 1
    finished = subprocess.run(command, capture_output=True, text=True, check=True)
    (line,) = [line for line in finished.stderr.splitlines() if "first step" in line]
    total, *parts = map(float, re.findall(r"\d+\.\d", line))
    assert re.findall(r"(\w+) \d+\.", line)[1:] == ["imports", "data", "state", "compile", "step"]
    assert total == pytest.approx(sum(parts), abs=0.3)
    assert parts[0] > 0.3  # imports
    summary = json.loads(finished.stdout)
    assert summary["params_digest"] == expected["params_digest"]
    assert json.loads((tmp_path / "train_summary.json").read_text()) == summary


def test_damaged_checkpoint_is_named_and_an_older_one_offered(undisturbed, small_config, tmp_path):
    workdir, _ = undisturbed
    shutil.copytree(workdir, tmp_path / "run")
    newest = tmp_path / "run" / "checkpoints" / "6"
    shutil.rmtree(newest / "state")
    with pytest.raises(UserError, match=r"checkpoints/6 is damaged.*go on from 4, move it"):
        train.train_and_evaluate(small_config(steps=7), tmp_path / "run")
    assert newest.is_dir()


def test_another_network_is_refused_on_resume(undisturbed, small_config):
    workdir, _ = undisturbed
    with pytest.raises(UserError, match=r"model\.total_stride \(saved 16, now 32\)"):
        train.train_and_evaluate(small_config(**{"model.total_stride": 32}), workdir)


def copy_run(workdir, folder, change):
    """Copies a run without the checksums of its newest checkpoint, whose metadata it changes."""
    shutil.copytree(workdir, folder)
    newest = folder / "checkpoints" / "6"
    (newest / checkpoint.CHECKSUMS).unlink()
    saved = newest / "run" / "metadata"
    saved.write_text(json.dumps(change(json.loads(saved.read_text()))))


def test_more_steps_go_on_from_an_older_versions_checkpoint(undisturbed, small_config, tmp_path):
    """Its metadata has only `config`, and a power cut left invalid lines in metrics.jsonl."""
    workdir, _ = undisturbed
    run = tmp_path / "run"
    copy_run(workdir, run, lambda saved: {"config": saved["config"]})
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(b'3\n{}\nnull\n{"step": null}\n\xff\n\0\0\n{"step": 5, "loss": "x"}\n')
    assert train.train_and_evaluate(small_config(steps=7), run)["step"] == 7
    assert sorted(losses(run)) == [1, 2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda run: [], r"6/run/metadata: damaged \(list where a dict is expected\)"),
        (lambda run: run | {"clock": "late"}, r"6/run/metadata: damaged \(clock is str\)"),
        (lambda run: run | {"config": {"model": 3}}, r"6: its config is damaged \(model is int\)"),
        (
            lambda run: run | {"config": {"model": {"gone": 1}}},
            r"6: config\.model\.gone is unknown",
        ),
    ],
)
def test_a_checkpoint_of_another_shape_is_named_on_resume(
    change, said, undisturbed, small_config, tmp_path
):
    workdir, _ = undisturbed
    copy_run(workdir, tmp_path / "run", change)
    with pytest.raises(UserError, match=f"{said}.*; to go on from 4, move it away"):
        train.train_and_evaluate(small_config(steps=7), tmp_path / "run")


def test_a_damaged_summary_is_named(undisturbed, small_config, tmp_path):
    workdir, _ = undisturbed
    shutil.copytree(workdir, tmp_path / "run")
    (tmp_path / "run" / "train_summary.json").write_text("{}")
    with pytest.raises(
        UserError, match=r"train_summary\.json: damaged .*; delete it and run again"
    ):
        train.train_and_evaluate(small_config(), tmp_path / "run")


def test_a_run_that_was_killed_before_its_first_save_begins_a_fresh_history(small_config, tmp_path):
    old = [{"step": step, "epoch": 0.2 * step, "loss": 99.0} for step in (1, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in old))
    train.train_and_evaluate(small_config(steps=2), tmp_path)
    found = losses(tmp_path)
    assert sorted(found) == [1, 2]
    assert max(found.values()) < 99


# ---- config.init_from ---------------------------------------------------------------------------


def test_an_empty_workdir_starts_from_the_weights_of_another_run(
    undisturbed, small_config, tmp_path
):
    """If nothing learns and no statistics move, valid has the results of the source run."""
    workdir, source = undisturbed
    still = {"optim.learning_rate": 0.0, "model.bn_momentum": 1.0}
    config = small_config(init_from=str(checkpoint.best(workdir)), steps=1, **still)
    valid = train.train_and_evaluate(config, tmp_path)["valid"]
    assert valid["loss"] == pytest.approx(source["valid"]["loss"], rel=1e-5)
    assert valid["auc"] == source["valid"]["auc"]


def test_checkpoints_in_the_workdir_win_over_init_from(undisturbed, small_config, tmp_path):
    """Even if init_from no longer exists, because a run on its way does not need it."""
    workdir, expected = undisturbed
    shutil.copytree(workdir, tmp_path / "run")
    (tmp_path / "run" / "train_summary.json").unlink(missing_ok=True)
    config = small_config(init_from=str(tmp_path / "nowhere"))
    summary = train.train_and_evaluate(config, tmp_path / "run")
    assert summary["params_digest"] == expected["params_digest"]


def test_missing_weights_are_an_error_before_data_are_read(small_config, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "open_splits", lambda _: pytest.fail("too late"))
    with pytest.raises(UserError, match=r"config\.init_from=.*nowhere: does not exist; give"):
        train.train_and_evaluate(small_config(init_from=str(tmp_path / "nowhere")), tmp_path)


def test_fine_tuning_holds_back_and_resumes(small_config, tmp_path):
    """The classifier and attention first, then all but the frozen; resumed to the same bits."""
    fields = {"optim.freeze": "stem/|block_00", "optim.layer_decay": 0.7, "steps": 4}
    fields |= {"optim.head_only_steps": 2, "checkpoint.every_steps": 2}
    config = small_config(**fields)
    summary = train.train_and_evaluate(config, tmp_path)
    fresh = train.create_state(config, _one_device()).params
    for step, held in ((2, ("stem", "block", "head")), (4, ("stem/", "block_00"))):
        path = tmp_path / "checkpoints" / str(step)
        state = checkpoint.restore(path, train.abstract_state(config), _one_device())
        same = jax.tree.map(np.array_equal, state.params, fresh)
        for name, is_same in flatten_dict(same, sep="/").items():
            # Of the others, look at kernels only: weight decay moves them even at a gradient of 0.
            if name.startswith(held) or name.endswith("kernel"):
                assert is_same == name.startswith(held), (step, name)
    shutil.rmtree(tmp_path / "checkpoints" / "4")
    (tmp_path / "train_summary.json").unlink()
    resumed = train.train_and_evaluate(config, tmp_path)
    assert resumed["params_digest"] == summary["params_digest"]
    with pytest.raises(UserError, match=r"another optim\.freeze \(saved 'stem"):
        train.train_and_evaluate(small_config(**fields | {"optim.freeze": "stem"}), tmp_path)


# ---- several steps in a call --------------------------------------------------------------------


def losses(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def test_several_steps_in_a_call_stop_resume_and_end_as_single_ones(
    undisturbed, small_config, tmp_path, monkeypatch
):
    workdir, expected = undisturbed  # single steps, its data on the host
    config = small_config(**{"data.placement": "device", "steps_per_call": 2})
    with monkeypatch.context() as patch:
        stop_before(patch, 1)
        assert train.train_and_evaluate(config, tmp_path)["step"] == 2  # no call is cut short
    summary = train.train_and_evaluate(config, tmp_path)
    assert losses(tmp_path) == pytest.approx(losses(workdir), abs=1e-5)
    assert {"4", "6"} <= {path.name for path in (tmp_path / "checkpoints").iterdir()}
    ours, single = (saved_state(path, config) for path in (tmp_path, workdir))
    for a, b in zip(*map(jax.tree.leaves, (ours, single)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    assert summary["valid"]["loss"] == pytest.approx(expected["valid"]["loss"], rel=1e-4)


def saved_state(workdir, config):
    path = workdir / "checkpoints" / "6"
    return checkpoint.restore(path, train.abstract_state(config), _one_device())


def test_several_steps_in_a_call_need_the_data_on_the_devices(small_config, tmp_path):
    config = small_config(**{"data.placement": "host", "steps_per_call": 2})
    with pytest.raises(UserError, match=r"steps_per_call=2 .*data\.placement=host"):
        train.train_and_evaluate(config, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    "fields",  # several changes at a time, because each combination is another program
    [
        {"rcc.enabled": False, "model.attention": "none"},
        {"model.total_stride": 32, "model.fusion": False, "dtype": "bfloat16"},
    ],
)
def test_trains_with_each_change_off(fields, small_config, tmp_path):
    summary = train.train_and_evaluate(small_config(steps=2, **fields), tmp_path)
    assert (summary["step"], summary["valid"]["n"]) == (2, 21)
    assert np.isfinite(summary["valid"]["loss"])


@pytest.mark.slow
def test_a_real_config_takes_a_step_and_checkpoints(data_dir, tmp_path):
    """The real network and settings; only the data, the batch and the windows are smaller."""
    fields = SHRUNK | {"batch_size": 4, "steps": 1, "rcc.min_size": 32, "rcc.max_size": 32}
    fields |= {"rcc.eval_size": 32, "data.source": "synthetic", "data.dir": data_dir}
    command = [
        sys.executable, "-m", "bef_jax.main", "--config=configs/b2.py",
        f"--workdir={tmp_path}", *(f"--config.{name}={value}" for name, value in fields.items()),
    ]  # fmt: skip
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    assert json.loads(result.stdout)["step"] == 1
    assert (tmp_path / "checkpoints" / "1" / "state").is_dir()


@pytest.mark.parametrize("name", ["paper", "gpu8", "resnet50", "densenet121"])
def test_a_step_of_a_real_config_leads_to_a_state_of_the_same_shapes(name):
    """At the real batch and size, which are traced here, and not compiled."""
    config = config_files.load(name)
    state = train.abstract_state(config)
    images = jax.ShapeDtypeStruct((config.batch_size, 96, 96, 3), np.uint8)
    labels = jax.ShapeDtypeStruct((config.batch_size,), np.int32)
    train_step, rate = make_train_step(config), np.float32(0.1)
    arguments = state, Batch(images, labels), jax.random.key(0), rate
    after, metrics = jax.eval_shape(train_step, *arguments)
    assert after == state
    assert set(metrics) == {"loss", "accuracy", "grad_norm", "learning_rate"}


def _one_device():
    return train.sharding.replicated(train.sharding.make_mesh())
