"""Scores patches with a trained network: uint8 patches in, log-odds or probabilities out."""

import functools
import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh
from ml_collections import ConfigDict
from scipy.special import expit

from bef_jax.data import augment
from bef_jax.errors import RunError
from bef_jax.models import create
from bef_jax.models.fold import fold_batch_norm
from bef_jax.runtime import sharding


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


def make_predictor(
    config: ConfigDict, variables: dict, mesh: Mesh
) -> Callable[[Iterable[np.ndarray]], Iterator[np.ndarray]]:
    """Returns `predict(patches)`, which yields probabilities of class 1, float64 [n], by batches.

    Patches are uint8 [96, 96, 3] each. A probability is the mean over the views of config.eval.tta,
    and NaN where one of them is not finite: `check_finite` before it is used.
    """
    score = make_scorer(config, mesh)(variables)
    size = batch_size(config, mesh)

    def log_odds(images: Array) -> list[Array]:
        return [score(images, view) for view in range(config.eval.tta)]

    def predict(patches: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        for views in map_patches(log_odds, patches, size, mesh):
            yield sigmoid(np.stack(views)).mean(axis=0)

    return predict


def make_featurizer(
    config: ConfigDict, variables: dict, mesh: Mesh
) -> Callable[[Iterable[np.ndarray]], Iterator[np.ndarray]]:
    """Returns `features(patches)`, which yields float32 [n, D] by batches.

    These are the pooled features that the classifier reads, of each patch as it is (one view).
    """
    model = create(config.model, config.dtype, folded=True)
    everywhere = sharding.replicated(mesh)

    @functools.partial(jax.jit, out_shardings=everywhere)
    def features(folded: dict, images: Array) -> Array:
        x = augment.eval_view(images, config)
        _, sown = model.apply(folded, x, train=False, mutable=["intermediates"])
        return sown["intermediates"]["features"][0]

    folded = jax.jit(
        functools.partial(fold_batch_norm, epsilon=config.model.bn_epsilon),
        out_shardings=everywhere,
    )(variables)
    size = batch_size(config, mesh)
    return lambda patches: map_patches(functools.partial(features, folded), patches, size, mesh)


def sigmoid(log_odds: np.ndarray) -> np.ndarray:
    """Returns the probabilities of class 1 of log-odds, both of one shape; float64.

    Those of log-odds that are not finite are NaN, although the sigmoid of infinity is 1: a network
    that overflows knows nothing.
    """
    # In float32 the most confident patches would all have probability 1, and tie.
    return np.where(np.isfinite(log_odds), expit(log_odds.astype(np.float64)), np.nan)


def check_finite(probabilities: np.ndarray, ids: Sequence[object]) -> None:
    """Raises `RunError` for the first of `probabilities`, [N], that is NaN; names its patch.

    NaN is not above any threshold, so it would be called normal.
    """
    wrong = np.flatnonzero(np.isnan(probabilities))
    if wrong.size:
        raise RunError(
            f"no finite score for patch {ids[wrong[0]]}: the network's weights, or what it "
            "computes of them, are not finite; give an earlier checkpoint"
        )


# ---- batches ------------------------------------------------------------------------------------


def batch_size(config: ConfigDict, mesh: Mesh) -> int:
    """Returns eval.batch_size, rounded up so that every device gets as many rows."""
    return -(-config.eval.batch_size // mesh.size) * mesh.size


def in_batches(patches: Iterable[np.ndarray], size: int) -> Iterator[list[np.ndarray]]:
    """Yields lists of `size` patches; the last one may be shorter."""
    patches = iter(patches)
    while batch := list(itertools.islice(patches, size)):  # itertools.batched needs Python 3.12
        yield batch


def map_patches(
    function: Callable, patches: Iterable[np.ndarray], size: int, mesh: Mesh
) -> Iterator:
    """Yields `function(images)` by batches, each fetched after the next one was asked for.

    Memory holds two batches, however many patches come. The last batch is filled up with its last
    patch, so that one program serves all; what the filling gives is cut off again.

    Args:
        function: uint8 [N, 96, 96, 3] on the devices of `mesh` -> arrays [N, ...].
        patches: uint8 [96, 96, 3] each.
        size: of a batch, a multiple of the devices.
    """
    counts = deque()

    def ask() -> Iterator:
        filled = 0
        for batch in in_batches(patches, size):
            counts.append(len(batch))
            filled = filled or _filled_size(len(batch), size, mesh)
            rows = np.minimum(np.arange(filled), len(batch) - 1)
            images = np.stack([batch[row] for row in rows])
            yield function(jax.device_put(images, sharding.by_rows(mesh)))

    for result in one_late(ask()):
        count = counts.popleft()
        yield jax.tree.map(lambda x, count=count: x[:count], result)


def _filled_size(count: int, size: int, mesh: Mesh) -> int:
    """The next power of two on each device: a single patch does not cost what a full batch does."""
    per_device = -(-count // mesh.size)
    return min(size, mesh.size << (per_device - 1).bit_length())


def one_late(results: Iterable) -> Iterator:
    """Fetches each result after the next was asked for, so that devices need not wait."""
    previous = None
    for result in results:
        if previous is not None:
            yield jax.device_get(previous)
        previous = result
    if previous is not None:
        yield jax.device_get(previous)


def padded_rows(n: int, batch_size: int) -> np.ndarray:
    """Row numbers 0 .. n - 1 in batches, [batches, batch_size]; the last row fills up."""
    batches = -(-n // batch_size)
    return np.minimum(np.arange(batches * batch_size), n - 1).reshape(batches, batch_size)
