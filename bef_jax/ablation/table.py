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


# This stands for `ablate.Run`, because that module imports this one.
class Finished(Protocol):
    """A run that has finished."""

    row: str
    seed: int
    workdir: Path

    def summary(self) -> dict:
        """Returns the summary of the run."""


def scored_block(summary: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the block of a summary that the table shows: test, or valid if there is no test."""
    return summary["test"] or summary["valid"]


def tabulate(runs: Sequence[Finished], threshold: float) -> dict[str, Any]:
    """Averages the runs of each row over their seeds, and tests each row against the baseline.

    Args:
        runs: finished runs.
        threshold: McNemar's test counts a probability from here on as positive.

    Returns:
        split and rows. Each row, in the order of the runs, has seeds, params, images_per_second,
        auc, auc_std, accuracy, accuracy_std (over seeds, ddof=1; None for one seed) and `against`:
        the comparison with the baseline, or None without one.
    """
    # Keyed by seed, so that a run is compared with the baseline's run of the same seed.
    by_row: dict[str, dict[int, Finished]] = {}
    for run in runs:
        by_row.setdefault(run.row, {})[run.seed] = run
    # All runs have the split of the first, because `ablate` refuses runs with other data.
    split = scored_block(runs[0].summary())["split"]
    baseline = by_row.get("baseline")
    rows = {}
    for name, of_row in by_row.items():
        rows[name] = _averages([run.summary() for run in of_row.values()])
        compared = baseline and name != "baseline"
        rows[name]["against"] = _against(of_row, baseline, split, threshold) if compared else None
    return {"split": split, "rows": rows}


def _averages(summaries: list[dict]) -> dict[str, Any]:
    blocks = [scored_block(summary) for summary in summaries]
    figures = {}
    for name in ("auc", "accuracy"):
        values = [block[name] for block in blocks]
        # No mean if one run has no value, because the row would average fewer runs than it says.
        figures[name] = float(np.mean(values)) if None not in values else None
        several = len(values) > 1 and None not in values
        # ddof=1, because with 0 the deviation of three seeds would be 18 % smaller.
        figures[f"{name}_std"] = float(np.std(values, ddof=1)) if several else None
    # The row gets their median, because one run on a busy machine would move a mean.
    speeds = [summary["images_per_second"] for summary in summaries]
    return {
        "seeds": len(blocks),
        "params": summaries[0]["params"],
        "images_per_second": float(np.median(speeds)),
        **figures,
    }


def _against(
    row: Mapping[int, Finished], baseline: Mapping[int, Finished], split: str, threshold: float
) -> dict[str, Any] | None:
    """Returns the row minus the baseline, over the seeds that both have.

    There are two questions. `seeds_p`, a paired t-test of the AUCs, asks whether other seeds would
    give the same result on these patches. `delong_p` and `mcnemar_p`, which test the probabilities
    averaged over the seeds, ask whether other patches would.
    """
    # Import scipy.stats here, because that takes a while and only a comparison needs it.
    from scipy.stats import ttest_rel

    # Pair runs by seed: the seed sets the order of patches, so both runs see the same batches.
    seeds = [seed for seed in row if seed in baseline]
    if not seeds:
        return None
    ours, theirs = ([_auc(runs[seed]) for seed in seeds] for runs in (row, baseline))
    first, second, labels = _averaged_scores(row, baseline, seeds, split)
    # The t-test divides by the deviation of the differences, which is 0 if all are equal.
    differs = len(seeds) > 1 and None not in ours + theirs and np.ptp(np.subtract(ours, theirs)) > 0
    return {
        "seeds": len(seeds),
        "seeds_p": float(ttest_rel(ours, theirs).pvalue) if differs else None,
        **paired_tests(first, second, labels, threshold),
    }


def _auc(run: Finished) -> float | None:
    return scored_block(run.summary())["auc"]


def _averaged_scores(
    row: Mapping[int, Finished], baseline: Mapping[int, Finished], seeds: list[int], split: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the probabilities of both rows, averaged over seeds, and the labels: [N] each."""
    # [2][seeds] of (ids, labels, scores), [N] each, in the order of the store that all runs share.
    read = [
        [read_probabilities(runs[seed].workdir / f"scores_{split}.csv") for seed in seeds]
        for runs in (row, baseline)
    ]
    ids, labels, _ = read[0][0]
    # Scores are averaged by position, and a store that was prepared again may have another order.
    if not all(np.array_equal(ids, other) for of_runs in read for other, _, _ in of_runs):
        raise UserError(
            "the runs of the table were scored on different patches, or in another order: give "
            "another --workdir"
        )
    first, second = (np.mean([scores for _, _, scores in of_runs], axis=0) for of_runs in read)
    return first, second, labels


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


def write_table(workdir: Path, table: Mapping[str, Any], runs: Sequence[Finished]) -> list[str]:
    """Writes ablation.md, ablation.csv, ablation_runs.csv and ablation.png; returns their paths."""
    write_text(workdir / "ablation.md", _markdown(table))
    write_text(workdir / "ablation.csv", _csv(_flat_rows(table)))
    write_text(workdir / "ablation_runs.csv", _csv([_flat_run(run) for run in runs]))
    from bef_jax.ablation.picture import draw  # here, because matplotlib imports slowly

    aucs = {name: [_auc(run) for run in runs if run.row == name] for name in table["rows"]}
    with replacing(workdir / "ablation.png") as file:
        draw(table, aucs, TITLES).savefig(file, format="png", dpi=150)
    return [str(workdir / name) for name in FILES]


def _markdown(table: Mapping[str, Any]) -> str:
    lines = [list(_HEAD.values()), ["---"] * len(_HEAD)]
    lines += [_cells(name, row) for name, row in table["rows"].items()]
    text = "".join(f"| {' | '.join(cells)} |\n" for cells in lines)
    note = (
        f"Results on {table['split']}: mean +- standard deviation over seeds. DeLong and McNemar "
        "test the probabilities averaged over seeds: would other patches give the same result? "
        "p, seeds is a paired t-test of the AUCs: would other seeds give the same result?"
    )
    return f"{text}\n{note}\n"


def _cells(name: str, row: Mapping[str, Any]) -> list[str]:
    against = row["against"] or {}
    interval = against.get("auc_difference_ci95")
    difference = (
        ""
        if not interval
        else (f"{against['auc_difference']:+.4f} ({interval[0]:+.4f} to {interval[1]:+.4f})")
    )
    return [
        TITLES.get(name, name),
        str(row["seeds"]),
        f"{row['params']:,}",
        f"{row['images_per_second']:.0f}",
        _spread(row["auc"], row["auc_std"], "{:.4f}"),
        _spread(row["accuracy"], row["accuracy_std"], "{:.2%}"),
        difference,
        *(_p_value(against.get(key)) for key in ("delong_p", "seeds_p", "mcnemar_p")),
    ]


def _spread(mean: float | None, std: float | None, form: str) -> str:
    if mean is None:
        return "-"
    return form.format(mean) + (f" +- {form.format(std)}" if std is not None else "")


def _p_value(p: float | None) -> str:
    if p is None:
        return ""
    # Four digits would show 0, which no p-value is.
    return "< 0.0001" if p < 1e-4 else f"{p:.4f}"


def _flat_rows(table: Mapping[str, Any]) -> list[dict]:
    rows = []
    for name, row in table["rows"].items():
        # The first row sets the order of the columns, and by default it is the baseline, which has
        # no comparison. So put the difference before the ends of its interval here.
        against = {"auc_difference": None, **(row["against"] or {})}
        low, high = against.pop("auc_difference_ci95", None) or (None, None)
        ends = {"auc_difference_low": low, "auc_difference_high": high}
        own = {key: value for key, value in row.items() if key != "against"}
        # Set `seeds` again, because a comparison counts only the seeds that the baseline has too.
        rows.append({"row": name, **own, **against, **ends, "seeds": row["seeds"]})
    return rows


def _flat_run(run: Finished) -> dict:
    summary = run.summary()
    block = scored_block(summary)
    kept = ("split", "n", "auc", "accuracy", "loss", "brier", "ece")
    timed = ("params", "images_per_second", "wall_seconds", "best_step")
    return {
        "row": run.row,
        "seed": run.seed,
        **{key: block[key] for key in kept},
        **{key: summary[key] for key in timed},
    }


def _csv(rows: list[dict]) -> str:
    # Take the columns of all rows: the baseline has no comparison, and leaves those empty.
    names = list(dict.fromkeys(name for row in rows for name in row))
    # No translation of newlines, because csv writes its own line ends.
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, names)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
