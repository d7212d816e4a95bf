"""The training step, and the compiled programs that take one or more steps on all devices."""

import dataclasses
import functools
import logging
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from clu import parameter_overview
from flax.traverse_util import flatten_dict
from jax import Array, lax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from bef_jax.data.augment import augment
from bef_jax.data.batches import Batch, Selection, gather
from bef_jax.data.patch import class_names
from bef_jax.errors import listed
from bef_jax.models import create, is_frozen
from bef_jax.runtime import sharding
from bef_jax.runtime.compiled import memory_bytes
from bef_jax.training import packing
from bef_jax.training.optim import make_optimizer, stop_frozen
from bef_jax.training.state import TrainState, count_params, update_ema

LOG = logging.getLogger(__name__)


def make_train_step(config: ConfigDict) -> Callable:
    """Returns `train_step(state, batch, key, rate, weights=None) -> (state, metrics)`, not jitted.

    All randomness comes from (key, state.step), so no random state passes from step to step. The
    key is the same for all steps of a run. `rate` is the learning rate of this step, float32 [].
    `weights` are those of the classes in the loss, from `class_weights`; None: all are 1. These are
    arguments, so that runs of every seed, length and learning rate find the same program in the
    compilation cache. A packed state (`packing`) stays packed. The metrics are float32 scalars:
    loss, accuracy, grad_norm, learning_rate.

    Without a mesh (`jax.set_mesh`) it is traced as for a CPU or a TPU.
    """
    model = create(config.model, config.dtype, config.bn_groups)

    def train_step(
        state: TrainState, batch: Batch, key: Array, rate: Array, weights: Array | None = None
    ) -> tuple[TrainState, dict[str, Array]]:
        gradients = functools.partial(_gradients, model, config, weights)
        # A schedule, though it ignores the count: with a number, optax's state would have no count,
        # and checkpoints have one.
        tx = make_optimizer(config, lambda count: rate)
        # Fold in state.step, so that a resumed run draws the same numbers.
        key = jax.random.fold_in(key, state.step)
        whole = packing.with_leaves(state, config)
        grads, batch_stats, metrics = _accumulate(gradients, config, whole, batch, key)
        grads, batch_stats = (packing.pack_like(state, tree) for tree in (grads, batch_stats))
        # Pass the parameters, because weight decay needs them.
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        variables, ema = {"params": params, "batch_stats": batch_stats}, state.ema
        # Use Python's if, so that without EMA the program has no arrays and no arithmetic for it.
        if config.ema_decay:
            ema = update_ema(ema, variables, state.step, config.ema_decay)
        # Log the norm before clipping, because it should show the data, not the optimiser.
        metrics["grad_norm"] = optax.tree.norm(grads)
        metrics["learning_rate"] = rate
        state = state.replace(step=state.step + 1, ema=ema, opt_state=opt_state, **variables)
        return state, metrics

    return train_step


def _accumulate(
    gradients: Callable, config: ConfigDict, state: TrainState, batch: Batch, key: Array
):
    """Returns gradients, batch statistics and metrics over optim.accumulate micro-batches.

    Gradients and metrics are averaged. Micro-batches interleave: each takes rows from every device,
    so that no row moves.
    """
    count = config.optim.accumulate
    if count == 1:
        return gradients(state.params, state.batch_stats, batch, key)
    # [count, B / count, ...]. Consecutive rows would be on a few devices only, but a scan needs
    # each micro-batch on all devices.
    micro = jax.tree.map(lambda x: x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1), batch)

    def body(batch_stats, item):
        grads, batch_stats, metrics = gradients(state.params, batch_stats, *item)
        return batch_stats, (grads, metrics)

    # Batch statistics pass from one micro-batch to the next, as between steps. Stacked gradients
    # take count times the parameters' bytes, in addition to the activations of one micro-batch.
    batch_stats, stacked = lax.scan(body, state.batch_stats, (micro, jax.random.split(key, count)))
    grads, metrics = jax.tree.map(lambda x: x.mean(0), stacked)
    return grads, batch_stats, metrics


def _gradients(
    model: nn.Module,
    config: ConfigDict,
    weights: Array | None,
    params,
    batch_stats,
    batch: Batch,
    key: Array,
):
    augment_key, dropout_key = jax.random.split(key)
    # Augment outside of loss_fn, because nothing before the images needs a gradient.
    images = augment(augment_key, batch.images, config)

    def loss_fn(params):
        logits, updates = model.apply(
            {"params": stop_frozen(params, config.optim.freeze), "batch_stats": batch_stats},
            images,
            train=True,
            mutable=["batch_stats"],
            rngs={"dropout": dropout_key},
        )
        loss = cross_entropy(logits, batch.labels, config.label_smoothing, weights)
        return loss, (logits, updates)

    (loss, (logits, updates)), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
    accuracy = jnp.mean(jnp.argmax(logits, -1) == batch.labels, dtype=jnp.float32)
    return grads, updates["batch_stats"], {"loss": loss, "accuracy": accuracy}


def cross_entropy(
    logits: Array, labels: Array, smoothing: float, weights: Array | None = None
) -> Array:
    """Returns the mean cross-entropy, in nats, of logits [N, classes] against labels [N].

    Args:
        labels: integers.
        smoothing: the share of the target that is spread evenly over all classes.
        weights: [classes], float32; an image counts as much as the class of its label says.
    """
    # [N, classes] in float32, like the logits, which are float32 for any config.dtype.
    targets = optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[-1]), smoothing)
    losses = optax.softmax_cross_entropy(logits, targets)
    if weights is None:
        return jnp.mean(losses)
    # Divide by N, not by the sum of the weights, so that what an image contributes does not depend
    # on which others share its batch.
    return jnp.mean(losses * weights[labels])


def class_weights(config: ConfigDict, labels: np.ndarray) -> np.ndarray | None:
    """Returns the weight of each class in the loss, float32 [classes]; None if all are 1.

    With data.class_weights=balanced it is n / (K * the patches of the class), where K counts the
    classes that have patches. This is the "balanced" of scikit-learn's `compute_class_weight`. The
    mean weight of the n patches is 1.

    Args:
        config: the whole configuration.
        labels: of the training split, [n], integers.
    """
    if config.data.class_weights == "none":
        return None
    if config.data.sampling == "balanced":
        LOG.warning(
            "config.data.class_weights and config.data.sampling are both balanced: each makes up "
            "for rare classes, so together they do too much; keep one"
        )
    counts = np.bincount(labels, minlength=config.model.num_classes)
    # No label asks for the weight of a class without patches, so any finite number will do.
    weights = len(labels) / (np.count_nonzero(counts) * np.maximum(counts, 1))
    pairs = zip(class_names(config), weights, strict=True)
    LOG.info("weights in the loss: %s", listed([f"{name} {weight:.3g}" for name, weight in pairs]))
    return weights.astype(np.float32)


# ---- compiled -----------------------------------------------------------------------------------


def compile_step(
    config: ConfigDict,
    mesh: Mesh,
    state: TrainState,
    placed: Batch | None = None,
    steps: int = 1,
    options: dict | None = None,
) -> jax.stages.Compiled:
    """Compiles `call(state, inputs, key, rates, weights) -> (state, metrics)` ahead of time.

    The state is donated: its memory becomes the next state's. `rates` are the learning rates of the
    call's steps, float32 [steps]. `weights` are from `class_weights`.

    Args:
        state: the state, or its shapes with their shardings.
        placed: the training split on the devices, or its shapes. With it, a call takes a
            `Selection` and gathers the batches itself, and each metric is stacked, [steps]. Without
            it, a call takes a `Batch`.
        steps: how many steps the call takes; more than one only with `placed`.
        options: for XLA, to compile on a machine without the devices.
    """
    # Give the sharding of the outputs, too. Otherwise XLA could split the new state over devices,
    # and it would not fit the next call's program.
    everywhere = sharding.replicated(mesh)
    train_step = make_train_step(config)
    call = make_one_step(train_step) if placed is None else make_multi_step(train_step, mesh)
    # Compile ahead of time, so that compiling is timed apart from the first step. Also, an input of
    # another shape is then an error, not minutes of compiling again.
    jitted = jax.jit(call, donate_argnums=0, out_shardings=(everywhere, everywhere))
    arguments = _abstract_arguments(config, mesh, placed, steps)
    # Tracing needs the mesh, because it decides between passes for GPUs and others
    # (`sharding.for_gpu`), and because our own kernels state on which devices they run.
    with jax.set_mesh(mesh):
        return jitted.lower(state, *arguments).compile(options)


def make_one_step(train_step: Callable) -> Callable:
    """Returns `call(state, batch, key, rates, weights) -> (state, metrics)`; `rates` is [1]."""

    def call(
        state: TrainState, batch: Batch, key: Array, rates: Array, weights: Array | None
    ) -> tuple[TrainState, dict[str, Array]]:
        return train_step(state, batch, key, rates[0], weights)

    return call


def make_multi_step(train_step: Callable, mesh: Mesh) -> Callable:
    """Returns `call(state, selection, key, rates, weights) -> (state, metrics)`, of S steps.

    `rates` and each metric are [S].
    """

    def call(
        state: TrainState, selection: Selection, key: Array, rates: Array, weights: Array | None
    ) -> tuple[TrainState, dict[str, Array]]:
        def step(state, item):
            indices, rate = item
            return train_step(state, gather(selection.split, indices, mesh), key, rate, weights)

        if len(rates) > 1:
            return lax.scan(step, state, (selection.indices, rates))
        # Do not scan over one step, because on CPU the body of a scan runs on one thread.
        state, metrics = step(state, (selection.indices[0], rates[0]))
        return state, jax.tree.map(lambda x: x[None], metrics)

    return call


def _abstract_arguments(config: ConfigDict, mesh: Mesh, placed: Batch | None, steps: int) -> tuple:
    """Returns the shapes of what a call takes besides the state."""
    key, weights = jax.eval_shape(jax.random.key, 0), None
    rates = jax.ShapeDtypeStruct((steps,), jnp.float32)
    if config.data.class_weights != "none":
        weights = jax.ShapeDtypeStruct((config.model.num_classes,), jnp.float32)
    others = sharding.with_sharding((key, rates, weights), sharding.replicated(mesh))
    return _abstract_batches(config, mesh, placed, steps), *others


def _abstract_batches(
    config: ConfigDict, mesh: Mesh, placed: Batch | None, steps: int
) -> Batch | Selection:
    if placed is not None:
        # [S, B]: one array for all steps of a call.
        shape, everywhere = (steps, config.batch_size), sharding.replicated(mesh)
        return Selection(placed, jax.ShapeDtypeStruct(shape, jnp.int32, sharding=everywhere))
    side, rows = config.data.patch_size, sharding.by_rows(mesh)
    shape = (config.batch_size, side, side, 3)
    images = jax.ShapeDtypeStruct(shape, jnp.uint8, sharding=rows)
    labels = jax.ShapeDtypeStruct(shape[:1], jnp.int32, sharding=rows)
    return Batch(images, labels)


@dataclasses.dataclass(frozen=True)
class Row:
    """A line of the table of parameters."""

    module: str
    tensors: int
    parameters: str


def describe(config: ConfigDict, state: TrainState, compiled: jax.stages.Compiled) -> None:
    """Logs the parameters of each module, and the memory that a device needs for a call."""
    rows = [
        Row(name, len(jax.tree.leaves(params)), f"{count_params(params):,}")
        for name, params in [*sorted(state.params.items()), ("all", state.params)]
    ]
    for line in parameter_overview.make_table(rows).splitlines():
        LOG.info("%s", line)
    if config.optim.freeze:
        _log_frozen(state, config.optim.freeze)
    needed = memory_bytes(compiled)
    if needed is not None:
        LOG.info("a call of the step needs %.0f MiB on each device", needed / 2**20)


def _log_frozen(state: TrainState, pattern: str) -> None:
    params = flatten_dict(state.params, sep="/")
    frozen = {path: leaf for path, leaf in params.items() if is_frozen(path, pattern)}
    LOG.info(
        "frozen: %d of %d tensors, %s parameters; their batch statistics are still updated",
        len(frozen), len(params), f"{count_params(frozen):,}",
    )  # fmt: skip
