"""A run of three classes of several patients, from its patches to its figures."""

import dataclasses
import json

import numpy as np
import pytest
from sklearn.metrics import confusion_matrix, roc_auc_score

from bef_jax import evaluate, train
from bef_jax.data import store
from bef_jax.runtime import sharding
from bef_jax.scoring import evaluator, trained
from bef_jax.scoring.probabilities_csv import read_probabilities
from bef_jax.training import checkpoint
from bef_jax.training.state import create_state

NAMES = ("stroma", "=tumour", "fat")
SIZES = {"train": 48, "valid": 30, "test": 24}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Returns a folder of npz files: patches of three colours, each of one of six patients."""
    folder = tmp_path_factory.mktemp("npz")
    rng = np.random.default_rng(0)
    for split, n in SIZES.items():
        labels = np.arange(n) % 3
        images = rng.integers(0, 200, (n, 96, 96, 3), np.uint8)
        images[np.arange(n), :, :, labels] += 40
        groups = np.array([f"{split} {row // 3 % 6}" for row in range(n)])
        np.savez(folder / f"{split}.npz", images=images, labels=labels, groups=groups)
    return folder


@pytest.fixture
def config_of(folder, small_config):
    """Returns config_of(**fields): a run of three steps on those patches."""

    def make(**fields):
        data = {"data.source": "npz", "data.dir": str(folder), "data.classes": NAMES}
        sizes = {f"data.{split}_size": n for split, n in SIZES.items()}
        return small_config(**data, **sizes, **{"model.num_classes": 3, "steps": 3}, **fields)

    return make


@pytest.fixture
def summary(config_of, workdir, monkeypatch):
    """Returns the summary of a run, which the first test trains; the report has its own tests."""
    monkeypatch.setattr("bef_jax.report.report_run", lambda **_: "no page")
    return train.train_and_evaluate(config_of(), workdir)


def test_a_run_reports_the_figures_of_its_probabilities(summary, workdir):
    assert json.loads(json.dumps(summary, allow_nan=False))["test"] == summary["test"]
    for split, n in (("valid", 30), ("test", 24)):
        block = summary[split]
        _, labels, probabilities = read_probabilities(workdir / f"scores_{split}.csv", "")
        assert (block["split"], block["n"], probabilities.shape) == (split, n, (n, 3))
        np.testing.assert_array_equal(labels, np.arange(n) % 3)
        expected = roc_auc_score(labels, probabilities, multi_class="ovr")
        assert block["auc"] == pytest.approx(expected)
        called = probabilities.argmax(axis=1)
        assert block["confusion"] == confusion_matrix(labels, called).tolist()
        assert list(block["per_class"]) == list(NAMES)
        low, high = block["auc_ci95"]
        assert low < block["auc"] < high
        assert block["ci95"]["resampled"] == "groups" and "auc" not in block["ci95"]
        assert list(block["ci95"]["per_class"]) == list(NAMES)
        assert block["operating_point"]["threshold"] is None


def test_training_keeps_the_best_checkpoint_by_the_macro_auc(summary, workdir):
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    aucs = {line["step"]: line["valid_auc"] for line in lines if "valid_auc" in line}
    assert aucs[summary["best_step"]] == max(aucs.values()) == summary["valid"]["auc"]
    point = checkpoint.read_metadata(checkpoint.best(workdir))["operating_point"]
    assert point["threshold"] is None
    assert point["temperature"] == pytest.approx(summary["valid"]["calibrated"]["temperature"])


def test_eval_mode_gives_what_training_reported_and_compares(summary, workdir):
    path = checkpoint.best(workdir)
    found = evaluate.evaluate_checkpoint(trained.scoring_config(path), path, "test", path)
    for name in ("auc", "loss", "brier", "auc_ci95"):
        assert found[name] == pytest.approx(summary["test"][name], rel=1e-5)
    for name, figures in summary["test"]["ci95"]["per_class"].items():
        assert found["ci95"]["per_class"][name].keys() == figures.keys()
    comparison = found["comparison"]
    assert comparison["auc"] == found["auc"]
    assert comparison["auc_difference_ci95"] == [0.0, 0.0]
    assert comparison["only_first_right"] == comparison["only_second_right"] == 0


def test_two_classes_with_groups_have_an_interval_over_groups(small_config):
    config, mesh = small_config(), sharding.make_mesh()
    store.prepare(config.data)
    valid = store.open_split(store.store_path(config.data), "valid")
    groups = np.array([f"patient {row % 7}" for row in range(len(valid))])
    variables = create_state(config, sharding.replicated(mesh)).eval_variables()
    evaluate_split = evaluator.make_evaluator(config, mesh)
    alone = evaluate_split(variables, valid)
    grouped = evaluate_split(variables, dataclasses.replace(valid, groups=groups))
    # DeLong's interval takes the patches as independent.
    assert alone.metrics["auc_ci95"] is not None and grouped.metrics["auc_ci95"] is None
    first, second = (evaluator.summarise(x, config, x) for x in (alone, grouped))
    assert second["auc_ci95"][0] <= second["auc"] <= second["auc_ci95"][1]
    assert second["ci95"].pop("resampled") == "groups"
    assert first["ci95"].keys() == second["ci95"].keys()
    differing = {name for name in first if first[name] != second[name]}
    assert differing == {"auc_ci95", "ci95"}


def test_eight_views_have_an_interval_of_one_view_too(config_of):
    config, mesh = config_of(**{"eval.tta": 8}), sharding.make_mesh()
    store.prepare(config.data)
    valid = store.open_split(store.store_path(config.data), "valid")
    variables = create_state(config, sharding.replicated(mesh)).eval_variables()
    evaluation = evaluator.make_evaluator(config, mesh)(variables, valid)
    assert evaluation.probabilities.shape == evaluation.plain.shape == (30, 3)
    assert not np.allclose(evaluation.probabilities, evaluation.plain)
    assert (evaluation.classes, list(evaluation.groups)) == (NAMES, list(valid.groups))
    block = evaluator.summarise(evaluation, config, evaluation)
    for figures in (block, block["plain"]):
        low, high = figures["auc_ci95"]
        assert low <= figures["auc"] <= high
