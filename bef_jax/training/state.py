"""The training state: one struct, which a checkpoint holds whole."""

import functools
import hashlib

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.sharding import Sharding
from ml_collections import ConfigDict

from bef_jax.data.patch import PATCH
from bef_jax.models import create
from bef_jax.training.optim import make_optimizer


@flax.struct.dataclass
class TrainState:
    """All that decides the next step, besides the configuration.

    Attributes:
        step: steps taken, int32 [].
        params, batch_stats: the network's variables, float32.
        ema: running average of {params, batch_stats}, or None.
        opt_state: optax's.
    """

    step: Array
    params: dict
    batch_stats: dict
    ema: dict | None
    opt_state: optax.OptState

    def eval_variables(self) -> dict:
        """The variables that evaluation uses: the average when there is one."""
        # With its own batch statistics: averaged weights need those that belong to them.
        return self.ema or {"params": self.params, "batch_stats": self.batch_stats}


def create_state(config: ConfigDict, sharding: Sharding) -> TrainState:
    """A fresh state from config.seed; parameters are created where `sharding` puts them."""
    # Hundreds of small random arrays run once: on CPU, optimising them takes longer than the rest
    # of the start. GPU and TPU compilers do not know the option's name alike.
    on_cpu = jax.default_backend() == "cpu"
    options = {"xla_backend_optimization_level": 0} if on_cpu else None
    # Jitted with their sharding, so that no device holds all first, and none has to send.
    init = functools.partial(_init_state, config)
    # The key is an argument, so that every seed finds the same program in the compilation cache.
    key = jax.random.key(config.seed)
    return jax.jit(init, out_shardings=sharding, compiler_options=options)(key)


def abstract_state(config: ConfigDict) -> TrainState:
    """The shapes and dtypes of the state that `config` trains; nothing is computed."""
    return jax.eval_shape(functools.partial(_init_state, config), jax.random.key(config.seed))


def _init_state(config: ConfigDict, key: Array) -> TrainState:
    model = create(config.model, config.dtype, config.bn_groups)
    images = jnp.zeros((1, PATCH, PATCH, 3))
    # In inference, which needs neither a key for dropout nor a batch to take statistics from.
    variables = model.init(key, images, train=False)
    tx = make_optimizer(config, lambda step: 0.0)  # its state does not depend on the schedule
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=variables["params"],
        batch_stats=variables["batch_stats"],
        # A copy: the step is given the whole state to overwrite, and no buffer may be given twice.
        ema=jax.tree.map(jnp.copy, dict(variables)) if config.ema_decay else None,
        opt_state=tx.init(variables["params"]),
    )


def update_ema(ema: dict, variables: dict, step: Array, decay: float) -> dict:
    """Moves the average towards `variables`.

    The decay warms up as (1 + step) / (10 + step), so a short run is not held at its start.
    """
    # As TensorFlow's moving average does by num_updates: 0.1 at the first step, 0.99 after some
    # 900.
    keep = jnp.minimum(decay, (1 + step) / (10 + step)).astype(jnp.float32)
    return jax.tree.map(lambda average, new: keep * average + (1 - keep) * new, ema, variables)


def count_params(params) -> int:
    """How many numbers training fits."""
    return sum(x.size for x in jax.tree.leaves(params))


def params_digest(params, batch_stats) -> str:
    """sha256 over parameters and batch statistics, in sorted path order."""
    leaves = jax.tree_util.tree_leaves_with_path({"batch_stats": batch_stats, "params": params})
    # Sorted by name: an order of fields, which a library may change, must not change the digest.
    named = sorted((jax.tree_util.keystr(path), leaf) for path, leaf in leaves)
    digest = hashlib.sha256()
    for name, leaf in named:
        digest.update(name.encode())
        # Bits, not values: two runs are the same, or they are not.
        digest.update(np.ascontiguousarray(jax.device_get(leaf)).tobytes())
    return digest.hexdigest()
