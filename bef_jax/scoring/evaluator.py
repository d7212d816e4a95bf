"""Exact evaluation: every patch counts once, for any batch size and number of devices."""

import dataclasses
from collections.abc import Callable

import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from bef_jax.data.batches import put_batch
from bef_jax.data.store import Split
from bef_jax.scoring.calibration import tuned_figures
from bef_jax.scoring.intervals import auc_interval, intervals
from bef_jax.scoring.metrics import Evaluation
from bef_jax.scoring.multiclass import metrics_of
from bef_jax.scoring.scorer import (
    Scorer,
    batch_size,
    check_finite,
    fetch_one_behind,
    make_scorer,
    mean_probabilities,
    padded_rows,
)


def make_evaluator(config: ConfigDict, mesh: Mesh) -> Callable[[dict, Split], Evaluation]:
    """Returns `evaluate(variables, split) -> Evaluation`; see `evaluate_split`.

    It compiles once for all splits and checkpoints.
    """
    bind = make_scorer(config, mesh)
    return lambda variables, split: evaluate_split(config, mesh, bind(variables), split)


def evaluate_split(config: ConfigDict, mesh: Mesh, scorer: Scorer, split: Split) -> Evaluation:
    """Scores all patches of a split, and returns the scores with their metrics.

    Raises:
        RunError: the scores of a patch are not finite.
    """
    # Neither is a list, so that the host gathers a batch while devices score the one before.
    rows_of = padded_rows(len(split), batch_size(config, mesh))
    scored = fetch_one_behind(
        map(scorer, (put_batch(split, mesh, rows).images for rows in rows_of))
    )
    # Probabilities, and those of the first view, of each batch: the scores of all views of
    # thousands of classes would fill the memory.
    found = [(mean_probabilities(x), mean_probabilities(x[:1])) for x in scored]
    # [N] or [N, K] each, without the padding of the last batch.
    probabilities, plain = (np.concatenate(x)[: len(split)] for x in zip(*found, strict=True))
    plain = plain if config.eval.tta > 1 else None
    check_finite(probabilities, split.ids)
    metrics = metrics_of(probabilities, split.labels, split.classes, config.eval.threshold)
    if split.groups is not None:
        metrics["auc_ci95"] = None  # DeLong's needs independent patches; see `summarise`
    return Evaluation(
        split=split.name,
        ids=split.ids,
        labels=split.labels,
        probabilities=probabilities,
        metrics=metrics,
        plain=plain,
        classes=split.classes,
        groups=split.groups,
    )


def summarise(evaluation: Evaluation, config: ConfigDict, valid: Evaluation) -> dict:
    """Returns the block of a summary that describes one evaluation.

    It has the network's own figures. `ci95` has intervals of them (`intervals.intervals`), except
    that of the AUC, which is `auc_ci95`. `calibrated` and `operating_point` have figures with a
    temperature and at a threshold that were chosen on `valid`. Where `tta` views were averaged,
    `plain` has the figures of one view.
    """
    block = {"split": evaluation.split, **evaluation.metrics, "tta": config.eval.tta}
    ci95 = intervals(evaluation)
    if "auc" in ci95:
        block["auc_ci95"] = ci95.pop("auc")
    block |= {"ci95": ci95, **tuned_figures(valid, evaluation)}
    if evaluation.plain is not None:
        truth = evaluation.labels, evaluation.classes
        metrics = metrics_of(evaluation.plain, *truth, config.eval.threshold)
        plain = dataclasses.replace(evaluation, probabilities=evaluation.plain, metrics=metrics)
        block["plain"] = metrics | {"auc_ci95": auc_interval(plain)}
    return block
