"""Exact evaluation: every patch counts once, for any batch size and number of devices."""

import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh
from ml_collections import ConfigDict
from scipy.special import expit

from bef_jax import checkpoint, sharding
from bef_jax.calibration import tuned
from bef_jax.compare import paired_tests
from bef_jax.config import flatten, validate
from bef_jax.data import augment, store
from bef_jax.data.batches import put_batch
from bef_jax.data.store import Split
from bef_jax.errors import UserError
from bef_jax.intervals import intervals
from bef_jax.metrics import Evaluation, binary_metrics
from bef_jax.models import create
from bef_jax.models.fold import fold_batch_norm
from bef_jax.state import abstract_state

# Fields of config.model that come with the weights: imported ones have their source's.
_CONVENTION = ("padding", "bn_epsilon", "bn_momentum")
# How blocks are computed in training: nothing to those who evaluate.
_FORMS = {"mbconv": "layers", "remat": "none"}


def run(
    config: ConfigDict,
    workdir: Path,
    checkpoint_path: Path | None,
    split: str | None,
    other: Path | None = None,
) -> dict:
    """--mode=eval: the metrics of a checkpoint on one split.

    Args:
        checkpoint_path: a checkpoint's folder; the best of `workdir` without it.
        split: train, valid or test; test without it, or valid where there is no test.
        other: a checkpoint, of any network, to test this one against on the same patches.

    Raises:
        UserError: no such checkpoint or split, or the checkpoint is of another network.
    """
    path = checkpoint_path or checkpoint.best(workdir)
    config = with_network_of(path, config)
    folder = store.store_path(config.data)
    counts = store.read_manifest(folder)["counts"]
    patches = store.open_split(folder, split or ("test" if counts.get("test") else "valid"))
    # Before the first evaluation: a wrong path is told at once, not in the end.
    against = _network_of(other, config) if other else None
    evaluate = _evaluator(path, config)
    # Temperature and threshold are chosen on valid, which costs a pass of its own where another
    # split was asked for.
    evaluation = valid = evaluate(patches)
    if patches.name != "valid" and counts.get("valid"):
        valid = evaluate(store.open_split(folder, "valid"))
    summary = {"mode": "eval", "checkpoint": str(path), **summarise(evaluation, config, valid)}
    if against:
        summary["comparison"] = _compare(evaluation, other, against, patches)
    return summary


def _evaluator(path: Path, config: ConfigDict) -> Callable[[Split], Evaluation]:
    """Evaluates the checkpoint at `path`; read and compiled once, for several splits."""
    mesh = sharding.make_mesh()
    state = checkpoint.restore(path, abstract_state(config), sharding.replicated(mesh))
    return functools.partial(make_evaluator(config, mesh), state.eval_variables())


def _compare(evaluation: Evaluation, path: Path, config: ConfigDict, patches: Split) -> dict:
    other = _evaluator(path, config)(patches)
    tests = paired_tests(
        evaluation.probabilities,
        other.probabilities,
        other.labels,
        config.eval.threshold,
    )
    return {"checkpoint": str(path), "auc": other.metrics["auc"], **tests}


def with_network_of(path: Path, config: ConfigDict) -> ConfigDict:
    """The configuration that the checkpoint at `path` was trained with, but `config`'s data.

    Of `config`, `data`, `eval`, `rcc.eval_size` and `model.depthwise` count: they say what is
    evaluated, and how. Padding and batch normalisation are the checkpoint's own. A field that is
    newer than the checkpoint has its default.

    Raises:
        UserError: `config` asks for another network, naming the fields.
    """
    # Through JSON, as the saved one went: it makes lists of tuples, which would differ.
    given = ConfigDict(json.loads(config.to_json_best_effort()))
    saved = _network_of(path, given)
    given.model.update({field: saved.model[field] for field in _CONVENTION} | _FORMS)
    old, new = flatten(saved.model), flatten(given.model)
    differing = [name for name in old if old[name] != new[name]]
    if differing:
        listed = ", ".join(f"model.{name}={old[name]}" for name in differing)
        raise UserError(f"checkpoint {path} has {listed}: give the config that trained it")
    return saved


def _network_of(path: Path, given: ConfigDict) -> ConfigDict:
    """The configuration of a checkpoint, of whatever network, with what of `given` counts."""
    saved = checkpoint.complete(checkpoint.read_run(path)["config"])
    saved.model.update({"depthwise": given.model.depthwise} | _FORMS)
    saved.update(data=given.data, eval=given.eval)
    saved.rcc.eval_size = given.rcc.eval_size
    # What is read from disk is checked like what a user gives: an older version's may have a field
    # that is gone.
    try:
        validate(saved)
    except UserError as error:
        raise UserError(f"checkpoint {path}: {error}") from error
    return saved


def make_evaluator(config: ConfigDict, mesh: Mesh) -> Callable[[dict, Split], Evaluation]:
    """Returns `evaluate(variables, split) -> Evaluation`; its one program compiles once."""
    scorer = make_scorer(config, mesh)
    # Up to a multiple of the devices: each gets as many rows.
    batch_size = -(-config.eval.batch_size // mesh.size) * mesh.size

    def evaluate(variables: dict, split: Split) -> Evaluation:
        score = scorer(variables)
        # By generators, so that the host gathers a batch while the devices score the one before.
        scored = one_late(
            [score(images, view) for view in range(config.eval.tta)]
            for images in (
                put_batch(split, mesh, rows).images for rows in padded_rows(len(split), batch_size)
            )
        )
        # [tta, N], float32, less what filled the last batch up.
        views = np.concatenate([np.stack(parts) for parts in scored], axis=1)[:, : len(split)]
        # Log-odds, then float64: in float32 the surest patches would all be 1, and tie.
        by_view = expit(views.astype(np.float64))
        probabilities, plain = by_view.mean(axis=0), by_view[0] if len(by_view) > 1 else None
        metrics = binary_metrics(probabilities, split.labels, config.eval.threshold)
        return Evaluation(split.name, split.ids, split.labels, probabilities, metrics, plain)

    return evaluate


def make_scorer(config: ConfigDict, mesh: Mesh) -> Callable[[dict], Callable[[Array, int], Array]]:
    """Returns `scorer(variables)`, which returns `score(images, view)`, jitted.

    A score is the log-odds of class 1 over class 0, [N], float32, on every device; of images
    [N, 96, 96, 3], uint8, sharded by rows, under view 0 .. config.eval.tta - 1. The network is
    folded: `scorer` puts batch normalisation into the convolutions, once for all batches.
    """
    # Scores go to every device: figures need the whole split, and each process computes them.
    everywhere = sharding.replicated(mesh)
    model = create(config.model, config.dtype, folded=True)
    log_odds = jax.jit(functools.partial(_log_odds, model, config), out_shardings=everywhere)
    fold = jax.jit(
        functools.partial(fold_batch_norm, epsilon=config.model.bn_epsilon),
        out_shardings=everywhere,
    )
    # Weights and view are arguments: one program serves every checkpoint and all eight views.
    return lambda variables: functools.partial(log_odds, fold(variables))


def one_late(results: Iterator) -> Iterator:
    """Fetches each result after the next was asked for, so that devices need not wait."""
    previous = None
    for result in results:
        if previous is not None:
            yield jax.device_get(previous)
        previous = result
    yield jax.device_get(previous)


def padded_rows(n: int, batch_size: int) -> np.ndarray:
    """Row numbers 0 .. n - 1 in batches, [batches, batch_size]; the last row fills up."""
    batches = -(-n // batch_size)
    return np.minimum(np.arange(batches * batch_size), n - 1).reshape(batches, batch_size)


def _log_odds(
    model: nn.Module, config: ConfigDict, variables: dict, images: Array, view: int
) -> Array:
    """The margin of class 1 over class 0 under one of the eight symmetries, [N], float32."""
    turned = (
        augment.symmetry(images, jnp.full(len(images), view)) if config.eval.tta > 1 else images
    )
    logits = model.apply(variables, augment.eval_view(turned, config), train=False)
    # The softmax of two classes is the sigmoid of this: 4 bytes a view leave the devices.
    return logits[:, 1] - logits[:, 0]


def summarise(evaluation: Evaluation, config: ConfigDict, valid: Evaluation) -> dict:
    """The block of a summary that describes one evaluation.

    Beside the figures of the network as it is (`ci95` has the intervals that they lack) stand those
    with a temperature and at a threshold that were chosen on `valid`; and, where `tta` views were
    averaged, the plain ones of each patch as it is.
    """
    block = {"split": evaluation.split, **evaluation.metrics, "tta": config.eval.tta}
    block |= {"ci95": intervals(evaluation), **tuned(valid, evaluation)}
    if evaluation.plain is not None:
        block["plain"] = binary_metrics(evaluation.plain, evaluation.labels, config.eval.threshold)
    return block
