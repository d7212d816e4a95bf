"""Scorers (patches -> scores of each view) and predictors (patches -> probabilities).

Scores are what a network says about a patch, before they become probabilities. For two classes
they are the log-odds of class 1, [N]. For K > 2 classes they are the logits, [N, K].
"""

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import Mesh
from ml_collections import ConfigDict
from scipy.special import expit, softmax

from bef_jax.data import augment
from bef_jax.errors import RunError
from bef_jax.models import create
from bef_jax.models.fold import fold_batch_norm
from bef_jax.runtime import sharding

# Takes images [N, S, S, 3], uint8, sharded by rows. Returns the scores under each view, float32,
# [N] or [N, K] each.
Scorer = Callable[[Array], list[Array]]


def make_scorer(config: ConfigDict, mesh: Mesh) -> Callable[[dict], Scorer]:
    """Returns `bind(variables)`, which returns the scorer with these variables.

    The scorer has config.eval.tta views, and its scores are on every device. Its network is
    folded: `bind` puts batch normalisation into the convolutions, once for all batches.
    """
    model = create(config.model, config.dtype, folded=True)
    # Scores go to every device, because each process computes figures of the whole split.
    score_view = jax.jit(
        functools.partial(view_scores, model, config), out_shardings=sharding.replicated(mesh)
    )
    fold = make_fold(config, mesh)

    def bind(variables: dict) -> Scorer:
        folded = fold(variables)
        # Weights and view are arguments, so one program serves all checkpoints and all views.
        return lambda images: [score_view(folded, images, view) for view in range(config.eval.tta)]

    return bind


def make_fold(config: ConfigDict, mesh: Mesh) -> Callable[[dict], dict]:
    """Returns `fold_batch_norm`, jitted, with its result on every device."""
    return jax.jit(
        functools.partial(fold_batch_norm, epsilon=config.model.bn_epsilon),
        out_shardings=sharding.replicated(mesh),
    )


def view_scores(
    model: nn.Module, config: ConfigDict, variables: dict, images: Array, view: int
) -> Array:
    """Returns the scores under one of the eight symmetries, float32, [N] or [N, K]."""
    turned = (
        augment.symmetry(images, jnp.full(len(images), view)) if config.eval.tta > 1 else images
    )
    logits = model.apply(variables, augment.eval_inputs(turned, config), train=False)
    # The log-odds decide both probabilities, so only 4 bytes per patch and view leave the devices.
    return log_odds(logits) if config.model.num_classes == 2 else logits


def log_odds(logits: Array) -> Array:
    """Returns the log-odds of class 1, [N], from logits [N, 2]; its sigmoid is the probability."""
    # logits[:, 1] would be a gather where N is symbolic, as in an export.
    negative, positive = (lax.index_in_dim(logits, i, 1, keepdims=False) for i in (0, 1))
    return positive - negative


def make_predictor(
    config: ConfigDict, scorer: Scorer, mesh: Mesh
) -> Callable[..., Iterator[np.ndarray]]:
    """Returns `predict(patches, sizes=())`, which yields probabilities, float64, by batches.

    They are [n], of class 1, or [n, K] for K > 2 classes. Each patch is uint8 [S, S, 3]. A caller
    must use `check_finite`, because a probability may be NaN (`mean_probabilities`).
    """
    size = batch_size(config, mesh)

    def predict(patches: Iterable[np.ndarray], sizes: Sequence[int] = ()) -> Iterator[np.ndarray]:
        return map(mean_probabilities, map_patches(scorer, patches, size, mesh, sizes))

    return predict


def make_featurizer(
    config: ConfigDict, variables: dict, mesh: Mesh
) -> Callable[[Iterable[np.ndarray]], Iterator[np.ndarray]]:
    """Returns `features(patches)`, which yields float32 [n, D] by batches.

    These are the pooled features that the classifier reads. Each patch has one view, as it is.
    """
    model = create(config.model, config.dtype, folded=True)

    @functools.partial(jax.jit, out_shardings=sharding.replicated(mesh))
    def batch_features(variables: dict, images: Array) -> Array:
        x = augment.eval_inputs(images, config)
        _, sown = model.apply(variables, x, train=False, mutable=["intermediates"])
        return sown["intermediates"]["features"][0]

    folded = make_fold(config, mesh)(variables)
    size = batch_size(config, mesh)
    function = functools.partial(batch_features, folded)
    return lambda patches: map_patches(function, patches, size, mesh)


def mean_probabilities(views: Sequence[np.ndarray]) -> np.ndarray:
    """Returns probabilities, float64, each a mean over views.

    Scores that are not finite give NaN, although the sigmoid of infinity is 1, because the outputs
    of a network that overflows mean nothing. One such logit makes all K probabilities NaN.

    Args:
        views: the scores under each view: log-odds [N] or logits [N, K].

    Returns:
        [N], of class 1, or [N, K], whose rows sum to 1.
    """
    # In float32, the most confident patches would all have probability 1, and would tie.
    scores = np.asarray(views, np.float64)
    if scores.ndim == 2:
        return np.where(np.isfinite(scores), expit(scores), np.nan).mean(axis=0)
    finite = np.isfinite(scores).all(axis=-1, keepdims=True)
    return softmax(np.where(finite, scores, np.nan), axis=-1).mean(axis=0)


def check_finite(probabilities: np.ndarray, ids: Sequence[object]) -> None:
    """Raises `RunError` if one of `probabilities` is NaN, and names the first such patch.

    NaN is not above any threshold, so the patch would be called normal.

    Args:
        probabilities: [N] or [N, K].
        ids: of the N patches.
    """
    wrong = np.argwhere(np.isnan(probabilities))
    if wrong.size:
        raise RunError(
            f"no finite score for patch {ids[wrong[0, 0]]}: the network's weights, or what it "
            "computes from them, are not finite; give an earlier checkpoint"
        )


# ---- batches ------------------------------------------------------------------------------------


def batch_size(config: ConfigDict, mesh: Mesh) -> int:
    """Returns eval.batch_size, rounded up so that all devices get equally many rows."""
    return sharding.round_up(config.eval.batch_size, mesh.size)


def in_batches(patches: Iterable[np.ndarray], size: int) -> Iterator[list[np.ndarray]]:
    """Yields lists of `size` patches; the last one may be shorter."""
    patches = iter(patches)
    while batch := list(itertools.islice(patches, size)):  # itertools.batched needs Python 3.12
        yield batch


def map_patches(
    function: Callable,
    patches: Iterable[np.ndarray],
    size: int,
    mesh: Mesh,
    sizes: Sequence[int] = (),
) -> Iterator:
    """Yields `function(images)` by batches, and fetches each result after the next call.

    Memory holds two batches, for any number of patches. The last batch is padded (`padded_rows`),
    so that one program serves all batches. The results of the padding are cut off.

    Args:
        function: takes uint8 [N, S, S, 3] on the devices of `mesh`, and returns arrays [N, ...].
        patches: uint8 [S, S, 3] each.
        size: patches per batch, a multiple of the number of devices.
        sizes: the sizes to which batches may be padded, ascending, such as `two_sizes`. Without it
            there is one, which depends on the first batch.
    """

    def start_batches(sizes: Sequence[int]) -> Iterator:
        for batch in in_batches(patches, size):
            # The first batch fixes the size, because no later one is longer.
            sizes = sizes or [_padded_size(len(batch), size, mesh)]
            padded_size = next(each for each in sizes if each >= len(batch))
            rows = padded_rows(len(batch), padded_size)[0]
            images = np.stack([batch[row] for row in rows])
            yield len(batch), function(jax.device_put(images, sharding.by_rows(mesh)))

    for count, result in fetch_one_behind(start_batches(sizes)):
        yield jax.tree.map(lambda x, count=count: x[:count], result)


def _padded_size(count: int, size: int, mesh: Mesh) -> int:
    """Returns the batch size after padding: a power of two per device, but at most `size`.

    So a single patch costs less than a full batch.
    """
    per_device = -(-count // mesh.size)
    return min(size, mesh.size << (per_device - 1).bit_length())


def two_sizes(size: int, mesh: Mesh) -> tuple[int, int]:
    """Returns an eighth of a batch's size, rounded up as `batch_size` does, and the size itself.

    Many short inputs, such as the rows of a slide, are padded to these. So two programs serve them
    all, and what is computed for one does not depend on the others.
    """
    return sharding.round_up(-(-size // 8), mesh.size), size


def fetch_one_behind(results: Iterable) -> Iterator:
    """Yields each result on the host after the next was started, so that devices do not wait."""
    previous = None
    for result in results:
        if previous is not None:
            yield jax.device_get(previous)
        previous = result
    if previous is not None:
        yield jax.device_get(previous)


def padded_rows(n: int, batch_size: int) -> np.ndarray:
    """Returns row numbers 0 .. n - 1, [batches, batch_size]; n - 1 is repeated as padding."""
    rows = np.arange(sharding.round_up(n, batch_size))
    return np.minimum(rows, n - 1).reshape(-1, batch_size)
