"""The ablation table: the averaged results of each row, and its tests against the baseline."""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from bef_jax.errors import UserError
from bef_jax.runtime.files import replacing, write_text
from bef_jax.scoring.paired_tests import paired_tests
from bef_jax.scoring.probabilities_csv import read_probabilities

FILES = ("ablation.md", "ablation.csv", "ablation_runs.csv", "ablation.png")
_RUN_AGAIN = "delete train_summary.json beside it and run again"
TITLES = {
    "baseline": "baseline",
    "rcc": "+ random center cropping",
    "rds": "+ reduced downsampling",
    "attention": "+ attention",
    "fusion": "+ feature fusion",
    "all": "all four",
    "resnet50": "ResNet-50",
    "densenet121": "DenseNet-121",
}


# This stands for `ablate.Trial`, because that module imports this one.
class Finished(Protocol):
    """A trial that has finished."""

    row: str
    seed: int
    workdir: Path

    def summary(self) -> dict:
        """Returns the summary of the trial."""


def scored_block(summary: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the block of a summary that the table shows: test, or valid if there is no test."""
    return summary["test"] or summary["valid"]


def tabulate(
    trials: Sequence[Finished], threshold: float, groups: np.ndarray | None = None
) -> dict[str, Any]:
    """Averages the trials of each row over their seeds, and tests each row against the baseline.

    Args:
        trials: finished trials.
        threshold: for two classes, McNemar's test counts a probability of at least this as
            positive.
        groups: str [N], the slide or patient of each patch of the scored split, if it is known.

    Returns:
        split and rows. Each row, in the order of the trials, has seeds, params, images_per_second,
        auc, auc_std, accuracy, accuracy_std (over seeds, ddof=1; None for one seed) and `against`:
        the comparison with the baseline, or None without one. With groups, or more than two
        classes, `resampled` says what the intervals of the differences resample.
    """
    # Keyed by seed, so that a trial is compared with the baseline's trial of the same seed.
    by_row: dict[str, dict[int, Finished]] = {}
    for trial in trials:
        by_row.setdefault(trial.row, {})[trial.seed] = trial
    # All trials have the split of the first, because `ablate` refuses trials with other data.
    split = scored_block(trials[0].summary())["split"]
    baseline = by_row.get("baseline")
    rows = {}
    for name, of_row in by_row.items():
        rows[name] = _averages([trial.summary() for trial in of_row.values()])
        rows[name]["against"] = None
        if baseline and name != "baseline":
            rows[name]["against"] = _compare_with_baseline(
                of_row, baseline, split, threshold, groups
            )
    table = {"split": split, "rows": rows}
    if groups is not None or has_many_classes(trials):
        table["resampled"] = "patches" if groups is None else "groups"
    return table


def has_many_classes(trials: Sequence[Finished]) -> bool:
    """Returns whether the trials have more than two classes."""
    return "per_class" in scored_block(trials[0].summary())


def _averages(summaries: list[dict]) -> dict[str, Any]:
    blocks = [scored_block(summary) for summary in summaries]
    figures = {}
    for name in ("auc", "accuracy"):
        values = [block[name] for block in blocks]
        # No mean if one trial has no value, because the row would average fewer than it says.
        figures[name] = float(np.mean(values)) if None not in values else None
        several = len(values) > 1 and None not in values
        # ddof=1, because with 0 the deviation of three seeds would be 18 % smaller.
        figures[f"{name}_std"] = float(np.std(values, ddof=1)) if several else None
    # The row gets their median, because one trial on a busy machine would move a mean.
    speeds = [summary["images_per_second"] for summary in summaries]
    return {
        "seeds": len(blocks),
        "params": summaries[0]["params"],
        "images_per_second": float(np.median(speeds)),
        **figures,
    }


def _compare_with_baseline(
    row: Mapping[int, Finished],
    baseline: Mapping[int, Finished],
    split: str,
    threshold: float,
    groups: np.ndarray | None,
) -> dict[str, Any] | None:
    """Returns the row minus the baseline, over the seeds that both have.

    There are two questions. `seeds_p`, a paired t-test of the AUCs, asks whether other seeds would
    give the same result on these patches. `paired_tests`, of the probabilities averaged over the
    seeds, ask whether other patches would.
    """
    # Import scipy.stats here, because that takes a while and only a comparison needs it.
    from scipy.stats import ttest_rel

    # Pair trials by seed: the seed sets the order of patches, so both see the same batches.
    seeds = [seed for seed in row if seed in baseline]
    if not seeds:
        return None
    ours, theirs = ([_auc(trials[seed]) for seed in seeds] for trials in (row, baseline))
    first, second, labels = _averaged_scores(row, baseline, seeds, split)
    if groups is not None and len(groups) != len(labels):
        raise UserError(
            f"the trials scored {len(labels)} patches of {split}, but the store has {len(groups)}; "
            "give another --workdir"
        )
    testable = (
        len(seeds) > 1
        and None not in ours + theirs
        # The t-test divides by the deviation of the differences, which is 0 if all are equal.
        and np.ptp(np.subtract(ours, theirs)) > 0
    )
    return {
        "seeds": len(seeds),
        "seeds_p": float(ttest_rel(ours, theirs).pvalue) if testable else None,
        **paired_tests(first, second, labels, threshold, groups),
    }


def _auc(trial: Finished) -> float | None:
    return scored_block(trial.summary())["auc"]


def _averaged_scores(
    row: Mapping[int, Finished], baseline: Mapping[int, Finished], seeds: list[int], split: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the probabilities of both rows, averaged over seeds, [N] or [N, K], and labels."""
    files = [
        trials[seed].workdir / f"scores_{split}.csv" for trials in (row, baseline) for seed in seeds
    ]
    # (ids, labels, scores), in the order of the store that all share.
    read = [read_probabilities(file, _RUN_AGAIN) for file in files]
    ids, labels, _ = read[0]
    # Scores are averaged by position, and a store that was prepared again may have another order.
    for file, (other, _, _) in zip(files, read, strict=True):
        if not np.array_equal(ids, other):
            raise UserError(
                f"{file}: scored on other patches than {files[0]}, or in another order; give "
                "another --workdir"
            )
    found = np.stack([scores for _, _, scores in read])
    scores = found.reshape(2, len(seeds), *found.shape[1:])
    return *scores.mean(axis=1), labels


# ---- what people read ---------------------------------------------------------------------------

_HEAD = {
    "row": "",
    "seeds": "seeds",
    "params": "parameters",
    "images_per_second": "images/s",
    "auc": "AUC",
    "accuracy": "accuracy",
    "auc_difference": "AUC minus baseline (95% CI)",
    "delong_p": "p, DeLong",
    "seeds_p": "p, seeds",
    "mcnemar_p": "p, McNemar",
}
# What the tests ask, by what `resampled` says.
_TESTS = {
    None: "DeLong and McNemar test the probabilities averaged over seeds: would other patches give "
    "the same result?",
    "patches": "The interval resamples patches, and McNemar tests decisions, both by the "
    "probabilities averaged over seeds: would other patches give the same result?",
    "groups": "The interval resamples groups, such as patients, by the probabilities averaged over "
    "seeds: would other groups give the same result?",
}
# The tests that do not hold then (`paired_tests`), and have no column.
_LEFT_OUT = {None: (), "patches": ("delong_p",), "groups": ("delong_p", "mcnemar_p")}


def write_table(workdir: Path, table: Mapping[str, Any], trials: Sequence[Finished]) -> list[str]:
    """Writes ablation.md, ablation.csv, ablation_runs.csv and ablation.png; returns their paths."""
    markdown, rows, runs, picture = (workdir / name for name in FILES)
    left_out = _LEFT_OUT[table.get("resampled")]
    write_text(markdown, _markdown(table, left_out, has_many_classes(trials)))
    write_text(rows, _csv([_flat_row(*item, left_out) for item in table["rows"].items()]))
    write_text(runs, _csv([_flat_trial(trial) for trial in trials]))
    from bef_jax.ablation.picture import draw  # here, because matplotlib imports slowly

    aucs = {name: [_auc(trial) for trial in trials if trial.row == name] for name in table["rows"]}
    with replacing(picture) as file:
        draw(table, aucs, TITLES).savefig(file, format="png", dpi=150)
    return [str(file) for file in (markdown, rows, runs, picture)]


def _markdown(table: Mapping[str, Any], left_out: Sequence[str], many_classes: bool) -> str:
    keys = [key for key in _HEAD if key not in left_out]
    lines = [[_HEAD[key] for key in keys], ["---"] * len(keys)]
    cells = (_cells(name, row) for name, row in table["rows"].items())
    lines += [[of_row[key] for key in keys] for of_row in cells]
    text = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    note = (
        f"Results on {table['split']}: mean +- standard deviation over seeds, and the median of "
        f"images/s. {_TESTS[table.get('resampled')]} "
        '"p, seeds" is a paired t-test of the AUCs: would other seeds give the same result?'
    )
    if many_classes:
        note += " The AUC is the mean over the classes, each against the rest."
    return f"{text}\n{note}\n"


def _cells(name: str, row: Mapping[str, Any]) -> dict[str, str]:
    against = row["against"] or {}
    return {
        "row": TITLES.get(name, name),
        "seeds": str(row["seeds"]),
        "params": f"{row['params']:,}",
        "images_per_second": f"{row['images_per_second']:.0f}",
        "auc": _spread(row["auc"], row["auc_std"], "{:.4f}"),
        "accuracy": _spread(row["accuracy"], row["accuracy_std"], "{:.2%}"),
        "auc_difference": _difference(against),
        **{key: _p_value(against.get(key)) for key in ("delong_p", "seeds_p", "mcnemar_p")},
    }


def _spread(mean: float | None, std: float | None, form: str) -> str:
    if mean is None:
        return "-"
    return form.format(mean) + (f" +- {form.format(std)}" if std is not None else "")


def _difference(against: Mapping[str, Any]) -> str:
    interval = against.get("auc_difference_ci95")
    if not interval:
        return ""
    low, high = interval
    return f"{against['auc_difference']:+.4f} ({low:+.4f} to {high:+.4f})"


def _p_value(p: float | None) -> str:
    if p is None:
        return ""
    # Four digits would show 0, which no p-value is.
    return "< 0.0001" if p < 1e-4 else f"{p:.4f}"


def _flat_row(name: str, row: Mapping[str, Any], left_out: Sequence[str]) -> dict:
    against = row["against"] or {}
    low, high = against.get("auc_difference_ci95") or (None, None)
    own = ("params", "images_per_second", "auc", "auc_std", "accuracy", "accuracy_std")
    tests = ("seeds_p", "delong_p", "only_first_right", "only_second_right", "mcnemar_p")
    return {
        "row": name,
        "seeds": row["seeds"],  # all of the row's, not only those that the baseline has too
        **{key: row[key] for key in own},
        "auc_difference": against.get("auc_difference"),
        "auc_difference_low": low,
        "auc_difference_high": high,
        **{key: against.get(key) for key in tests if key not in left_out},
    }


def _flat_trial(trial: Finished) -> dict:
    summary = trial.summary()
    block = scored_block(summary)
    kept = ["split", "n", "auc", "accuracy", "loss", "brier", "ece"]
    kept += [key for key in ("balanced_accuracy", "macro_f1") if key in block]
    timed = ("params", "images_per_second", "wall_seconds", "best_step")
    return {
        "row": trial.row,
        "seed": trial.seed,
        **{key: block[key] for key in kept},
        **{key: summary[key] for key in timed},
    }


def _csv(rows: list[dict]) -> str:
    # No translation of newlines, because csv writes its own line ends.
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, rows[0].keys())
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
