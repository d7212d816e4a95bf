"""--mode=eval: the metrics of a checkpoint on a split, and a comparison with another one."""

from collections.abc import Callable
from pathlib import Path

from ml_collections import ConfigDict

from bef_jax.data import store
from bef_jax.data.patch import class_names
from bef_jax.data.splits import check_store, warn_of_one_class
from bef_jax.data.store import Split
from bef_jax.runtime import sharding
from bef_jax.scoring import trained
from bef_jax.scoring.engines.predictor import EngineScorer
from bef_jax.scoring.evaluator import evaluate_split, summarise
from bef_jax.scoring.metrics import Evaluation
from bef_jax.scoring.paired_tests import paired_tests
from bef_jax.training import checkpoint


def evaluate_checkpoint(
    config: ConfigDict, path: Path, split: str | None = None, other: Path | None = None
) -> dict:
    """Returns the metrics of a checkpoint on one split, as the summary of --mode=eval.

    Args:
        config: as `trained.scoring_config` returns it for the checkpoint.
        path: the checkpoint's folder.
        split: train, valid or test. The default is test, or valid where there is no test.
        other: a checkpoint, of any network, to compare with this one on the same patches.

    Raises:
        UserError: there is no such checkpoint or split.
        RunError: the scores of a patch are not finite.
    """
    folder = store.store_path(config.data)
    manifest = store.read_manifest(folder)
    check_store(config, manifest, class_names(config))
    counts = manifest["counts"]
    patches = store.open_split(folder, split or ("test" if counts.get("test") else "valid"))
    # Read this before the first evaluation, so that a wrong path is an error at once.
    other_config = _config_of_other(other, config) if other else None
    evaluate = _evaluator(path, config)
    # Temperature and threshold are chosen on valid, which costs an extra pass if another split is
    # evaluated.
    evaluation = valid = evaluate(patches)
    if patches.name != "valid" and counts.get("valid"):
        valid = evaluate(store.open_split(folder, "valid"))
    for each in {evaluation.split: evaluation, valid.split: valid}.values():
        warn_of_one_class(each.split, each.labels)
    summary = {"mode": "eval", "checkpoint": str(path), **summarise(evaluation, config, valid)}
    if other:
        summary["comparison"] = _compare(evaluation, other, other_config, patches)
    return summary


def _config_of_other(other: Path, config: ConfigDict) -> ConfigDict:
    """Returns the other checkpoint's configuration, with data, eval and predict of `config`."""
    other_config = trained.scoring_config(other)
    other_config.update(data=config.data, eval=config.eval, predict=config.predict)
    return other_config


def _evaluator(path: Path, config: ConfigDict) -> Callable[[Split], Evaluation]:
    """Returns `evaluate(split)` for the checkpoint at `path`, which is read and compiled once."""
    mesh = sharding.make_mesh()
    variables = checkpoint.restore_variables(path, config, sharding.replicated(mesh))
    scorer = EngineScorer(config, variables, mesh)

    def evaluate(split: Split) -> Evaluation:
        scorer.expect(len(split))
        return evaluate_split(config, mesh, scorer, split)

    return evaluate


def _compare(evaluation: Evaluation, path: Path, config: ConfigDict, patches: Split) -> dict:
    other = _evaluator(path, config)(patches)
    tests = paired_tests(
        evaluation.probabilities,
        other.probabilities,
        other.labels,
        config.eval.threshold,
        other.groups,
    )
    return {"checkpoint": str(path), "auc": other.metrics["auc"], **tests}
