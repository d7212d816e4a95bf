"""The table's statistics, compared with NumPy, SciPy, scikit-learn and our DeLong test."""

import csv
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from scipy.special import softmax
from sklearn.metrics import roc_auc_score

from bef_jax.ablation.table import tabulate, write_table
from bef_jax.errors import UserError
from bef_jax.scoring.metrics import Evaluation, binary_metrics
from bef_jax.scoring.multiclass import multiclass_metrics
from bef_jax.scoring.probabilities_csv import write_probabilities
from tests.scoring.test_paired_tests import brute_force_delong


@dataclass
class FinishedTrial:
    row: str
    seed: int
    workdir: Path
    block: dict = field(default_factory=dict)

    def summary(self):
        figures = {"params": 5, "images_per_second": 10.0 + self.seed, "wall_seconds": 1.0}
        return {"valid": self.block, "test": None, "best_step": 3} | figures


def make_trials(folder, rows=("baseline", "all"), seeds=(0, 1, 2), n=200):
    labels = np.random.default_rng(0).integers(0, 2, n).astype(np.uint8)
    trials = []
    for seed in seeds:
        for gain, row in enumerate(rows):
            rng = np.random.default_rng([seed, gain])
            scores = stats.norm.cdf((1 + gain) * labels - 0.7 + rng.normal(size=n))
            workdir = folder / f"{row}{seed}"
            workdir.mkdir()
            metrics = binary_metrics(scores, labels)
            seen = Evaluation("valid", np.arange(n).astype(str), labels, scores, metrics)
            write_probabilities(workdir / "scores_valid.csv", seen)
            trials.append(FinishedTrial(row, seed, workdir, {"split": "valid", **metrics}))
    return trials, labels


def scores_of(trial):
    lines = list(csv.DictReader((trial.workdir / "scores_valid.csv").open()))
    return np.array([float(line["probability"]) for line in lines])


def test_means_deviations_and_both_tests_match_other_code(tmp_path):
    finished, labels = make_trials(tmp_path)
    table = tabulate(finished, 0.5)
    scores = {
        row: [scores_of(trial) for trial in finished if trial.row == row] for row in table["rows"]
    }
    aucs = {row: [roc_auc_score(labels, s) for s in of_row] for row, of_row in scores.items()}
    for row, values in aucs.items():
        assert table["rows"][row]["auc"] == pytest.approx(np.mean(values))
        assert table["rows"][row]["auc_std"] == pytest.approx(np.std(values, ddof=1))
    against = table["rows"]["all"]["against"]
    assert against["seeds_p"] == pytest.approx(
        stats.ttest_rel(aucs["all"], aucs["baseline"]).pvalue
    )
    averaged = [np.mean(scores[row], axis=0) for row in ("all", "baseline")]
    difference, error = brute_force_delong(*averaged, labels)
    assert against["auc_difference"] == pytest.approx(difference)
    assert against["delong_p"] == pytest.approx(2 * stats.norm.sf(abs(difference) / error))
    assert table["rows"]["baseline"]["against"] is None
    assert table["rows"]["all"]["images_per_second"] == 11.0


@pytest.mark.parametrize("change", [np.flip, lambda ids: np.char.add(ids, "x")])
def test_runs_of_other_patches_or_of_another_order_are_refused(change, tmp_path):
    finished, labels = make_trials(tmp_path)
    ids = change(np.arange(len(labels)).astype(str))
    scores = Evaluation("valid", ids, labels, scores_of(finished[-1]), {})
    file = finished[-1].workdir / "scores_valid.csv"
    write_probabilities(file, scores)
    with pytest.raises(UserError) as caught:
        tabulate(finished, 0.5)
    other = finished[1].workdir / "scores_valid.csv"  # of the same row, by its first seed
    assert str(caught.value).startswith(
        f"{file}: scored on other patches than {other}, or in another order; "
    )


def test_one_seed_has_no_deviation(tmp_path):
    finished, _ = make_trials(tmp_path, seeds=(0,))
    row = tabulate(finished, 0.5)["rows"]["all"]
    assert (row["auc_std"], row["against"]["seeds_p"]) == (None, None)
    assert row["against"]["delong_p"] is not None


def test_without_a_baseline_no_row_is_compared(tmp_path):
    finished, _ = make_trials(tmp_path, rows=("rds", "all"))
    assert {row["against"] is None for row in tabulate(finished, 0.5)["rows"].values()} == {True}


def test_only_seeds_that_both_rows_have_are_compared(tmp_path):
    finished, labels = make_trials(tmp_path)
    short = [trial for trial in finished if (trial.row, trial.seed) != ("baseline", 2)]
    against = tabulate(short, 0.5)["rows"]["all"]["against"]
    averaged = [
        np.mean([scores_of(x) for x in short if x.row == row and x.seed < 2], axis=0)
        for row in ("all", "baseline")
    ]
    assert against["seeds"] == 2
    assert against["auc_difference"] == pytest.approx(brute_force_delong(*averaged, labels)[0])


def test_files_hold_the_figures_of_the_table(tmp_path):
    finished, _ = make_trials(tmp_path)
    table = tabulate(finished, 0.5)
    write_table(tmp_path, table, finished)
    (line,) = [
        line for line in (tmp_path / "ablation.md").read_text().splitlines() if "all four" in line
    ]
    row = table["rows"]["all"]
    assert f"{row['auc']:.4f} +- {row['auc_std']:.4f}" in line
    rows = {r["row"]: r for r in csv.DictReader((tmp_path / "ablation.csv").open(newline=""))}
    written, against = rows["all"], row["against"]
    assert list(written)[:2] == ["row", "seeds"]
    assert float(written["auc"]) == row["auc"]
    for name in ("auc_difference", "delong_p"):
        assert float(written[name]) == against[name]
    interval = [float(written[f"auc_difference_{end}"]) for end in ("low", "high")]
    assert interval == list(against["auc_difference_ci95"])
    assert rows["baseline"]["delong_p"] == ""
    assert len(list(csv.DictReader((tmp_path / "ablation_runs.csv").open(newline="")))) == 6


# ---- more than two classes, and groups ----------------------------------------------------------

CLASSES = ("fat", "a/b", "mucus", "=1")


def make_trials_of_four(folder, n=300):
    """Returns trials as `make_trials` does, and the labels, but of four classes."""
    labels = np.random.default_rng(0).integers(0, 4, n).astype(np.uint8)
    trials = []
    for seed in (0, 1):
        for gain, row in enumerate(("baseline", "all")):
            logits = np.random.default_rng([seed, gain]).normal(size=(n, 4))
            logits[np.arange(n), labels] += 1 + gain
            probabilities = softmax(logits, axis=1)
            metrics = multiclass_metrics(probabilities, labels, CLASSES)
            ids = np.arange(n).astype(str)
            seen = Evaluation("valid", ids, labels, probabilities, metrics, classes=CLASSES)
            workdir = folder / f"{row}{seed}"
            workdir.mkdir()
            write_probabilities(workdir / "scores_valid.csv", seen)
            trials.append(FinishedTrial(row, seed, workdir, {"split": "valid", **metrics}))
    return trials, labels


def columns_of(trial):
    lines = list(csv.DictReader((trial.workdir / "scores_valid.csv").open()))
    return np.array([[float(line[f"probability_{name}"]) for name in CLASSES] for line in lines])


def test_four_classes_are_compared_by_their_macro_auc(tmp_path):
    finished, labels = make_trials_of_four(tmp_path)
    table = tabulate(finished, 0.5)
    averaged = {}
    for row in ("baseline", "all"):
        scores = [columns_of(trial) for trial in finished if trial.row == row]
        aucs = [roc_auc_score(labels, each, multi_class="ovr") for each in scores]
        assert table["rows"][row]["auc"] == pytest.approx(np.mean(aucs))
        assert table["rows"][row]["auc_std"] == pytest.approx(np.std(aucs, ddof=1))
        averaged[row] = np.mean(scores, axis=0)
    against = table["rows"]["all"]["against"]
    ours, theirs = (
        roc_auc_score(labels, averaged[row], multi_class="ovr") for row in ("all", "baseline")
    )
    assert against["auc_difference"] == pytest.approx(ours - theirs)
    low, high = against["auc_difference_ci95"]
    assert low < ours - theirs < high
    right = [averaged[row].argmax(axis=1) == labels for row in ("all", "baseline")]
    only = [int(np.sum(a & ~b)) for a, b in (right, right[::-1])]
    assert [against["only_first_right"], against["only_second_right"]] == only
    assert against["mcnemar_p"] == pytest.approx(stats.binomtest(only[0], sum(only)).pvalue)
    assert (against["delong_p"], table["resampled"]) == (None, "patches")


@pytest.mark.parametrize("grouped", [False, True])
def test_tests_that_do_not_hold_have_no_column(grouped, tmp_path):
    finished, labels = make_trials_of_four(tmp_path)
    groups = (np.arange(len(labels)) // 10).astype(str) if grouped else None
    table = tabulate(finished, 0.5, groups)
    write_table(tmp_path, table, finished)
    missing = {"delong_p", "mcnemar_p"} if grouped else {"delong_p"}
    (_, row) = csv.DictReader((tmp_path / "ablation.csv").open(newline=""))
    assert {"delong_p", "mcnemar_p", "seeds_p"} - row.keys() == missing
    text = (tmp_path / "ablation.md").read_text()
    head, _, *lines, _, note = text.splitlines()
    assert "p, DeLong" not in head and ("p, McNemar" in head) == (not grouped)
    assert {line.count("|") for line in (head, *lines)} == {11 - len(missing)}
    assert ("resamples groups" in note) == grouped and "mean over the classes" in note
    assert "DeLong" not in note
    (run, *_) = csv.DictReader((tmp_path / "ablation_runs.csv").open(newline=""))
    assert float(run["macro_f1"]) == finished[0].block["macro_f1"]


def test_groups_of_two_classes_are_resampled(tmp_path):
    finished, labels = make_trials(tmp_path)
    alone = tabulate(finished, 0.5)
    grouped = tabulate(finished, 0.5, (np.arange(len(labels)) // 20).astype(str))
    assert "resampled" not in alone and grouped["resampled"] == "groups"
    both = [table["rows"]["all"]["against"] for table in (alone, grouped)]
    assert both[0]["auc_difference"] == pytest.approx(both[1]["auc_difference"])
    assert both[0]["auc_difference_ci95"] != both[1]["auc_difference_ci95"]
    with pytest.raises(UserError, match="the store has 7; give another --workdir"):
        tabulate(finished, 0.5, np.array(list("abcdefg")))
