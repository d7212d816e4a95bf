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

    `score` takes images [N, 96, 96, 3], uint8, sharded by rows, and a view in
    0 .. config.eval.tta - 1. It returns the log-odds of class 1 over class 0, [N], float32, on
    every device. The network is folded: `scorer` puts batch normalisation into the convolutions,
    once for all batches.
    """
    # Scores go to every device, because each process computes figures of the whole split.
    everywhere = sharding.replicated(mesh)
    model = create(config.model, config.dtype, folded=True)
    log_odds = jax.jit(functools.partial(_log_odds, model, config), out_shardings=everywhere)
    fold = jax.jit(
        functools.partial(fold_batch_norm, epsilon=config.model.bn_epsilon),
        out_shardings=everywhere,
    )
    # Weights and view are arguments, so one program serves every checkpoint and all eight views.
    return lambda variables: functools.partial(log_odds, fold(variables))


def _log_odds(
    model: nn.Module, config: ConfigDict, variables: dict, images: Array, view: int
) -> Array:
    """Returns the log-odds of class 1 under one of the eight symmetries, [N], float32."""
    turned = (
        augment.symmetry(images, jnp.full(len(images), view)) if config.eval.tta > 1 else images
    )
    logits = model.apply(variables, augment.eval_view(turned, config), train=False)
    # The softmax of two classes is the sigmoid of this difference. So only 4 bytes per patch and
    # view leave the devices.
    return logits[:, 1] - logits[:, 0]


def make_predictor(
    config: ConfigDict, variables: dict, mesh: Mesh
) -> Callable[[Iterable[np.ndarray]], Iterator[np.ndarray]]:
    """Returns `predict(patches)`, which yields probabilities of class 1, float64 [n], by batches.

    Each patch is uint8 [96, 96, 3]. A probability is the mean over config.eval.tta views. It is NaN
    where one of them is not finite, so a caller must use `check_finite` first.
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

    These are the pooled features that the classifier reads. Each patch has one view, as it is.
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
    """Returns the probabilities of class 1 for log-odds; float64, of the same shape.

    Log-odds that are not finite give NaN, although the sigmoid of infinity is 1, because the scores
    of a network that overflows mean nothing.
    """
    # In float32, the most confident patches would all have probability 1, and would tie.
    return np.where(np.isfinite(log_odds), expit(log_odds.astype(np.float64)), np.nan)


def check_finite(probabilities: np.ndarray, ids: Sequence[object]) -> None:
    """Raises `RunError` if one of `probabilities`, [N], is NaN, and names the first such patch.

    NaN is not above any threshold, so the patch would be called normal.
    """
    wrong = np.flatnonzero(np.isnan(probabilities))
    if wrong.size:
        raise RunError(
            f"no finite score for patch {ids[wrong[0]]}: the network's weights, or what it "
            "computes from them, are not finite; give an earlier checkpoint"
        )


# ---- batches ------------------------------------------------------------------------------------


def batch_size(config: ConfigDict, mesh: Mesh) -> int:
    """Returns eval.batch_size, rounded up so that all devices get equally many rows."""
    return -(-config.eval.batch_size // mesh.size) * mesh.size


def in_batches(patches: Iterable[np.ndarray], size: int) -> Iterator[list[np.ndarray]]:
    """Yields lists of `size` patches; the last one may be shorter."""
    patches = iter(patches)
    while batch := list(itertools.islice(patches, size)):  # itertools.batched needs Python 3.12
        yield batch


def map_patches(
    function: Callable, patches: Iterable[np.ndarray], size: int, mesh: Mesh
) -> Iterator:
    """Yields `function(images)` by batches, and fetches each result after the next call.

    Memory holds two batches, for any number of patches. The last batch is filled up with its last
    patch, so that one program serves all batches. The results of the filling are cut off.

    Args:
        function: takes uint8 [N, 96, 96, 3] on the devices of `mesh`, and returns arrays [N, ...].
        patches: uint8 [96, 96, 3] each.
        size: patches per batch, a multiple of the number of devices.
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
    """Returns the batch size after filling: a power of two per device, but at most `size`.

    So a single patch costs less than a full batch.
    """
    per_device = -(-count // mesh.size)
    return min(size, mesh.size << (per_device - 1).bit_length())


def one_late(results: Iterable) -> Iterator:
    """Yields each result on the host after the next was asked for, so that devices do not wait."""
    previous = None
    for result in results:
        if previous is not None:
            yield jax.device_get(previous)
        previous = result
    if previous is not None:
        yield jax.device_get(previous)


def padded_rows(n: int, batch_size: int) -> np.ndarray:
    """Returns row numbers 0 .. n - 1, [batches, batch_size], filled up with n - 1."""
    batches = -(-n // batch_size)
    return np.minimum(np.arange(batches * batch_size), n - 1).reshape(batches, batch_size)
