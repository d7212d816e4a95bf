"""The training state: one struct, which a checkpoint holds completely."""

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

from bef_jax.models import create
from bef_jax.training.optim import make_optimizer


@flax.struct.dataclass
class TrainState:
    """Everything that decides the next step, except the configuration.

    Attributes:
        step: steps taken, int32 [].
        params, batch_stats: the network's variables, float32.
        ema: running average of {params, batch_stats}, or None.
        opt_state: the state of optax.
    """

    step: Array
    params: dict
    batch_stats: dict
    ema: dict | None
    opt_state: optax.OptState

    def eval_variables(self) -> dict:
        """Returns the variables that evaluation uses: the average if there is one."""
        # The average has its own batch statistics, because averaged weights need matching ones.
        return self.ema or {"params": self.params, "batch_stats": self.batch_stats}


def create_state(config: ConfigDict, sharding: Sharding) -> TrainState:
    """Returns a fresh state from config.seed, created where `sharding` puts it."""
    # This program makes hundreds of small random arrays, and runs only once. On CPU, optimising it
    # takes longer than the rest of the start. Not all compilers for GPU and TPU know the option.
    on_cpu = jax.default_backend() == "cpu"
    options = {"xla_backend_optimization_level": 0} if on_cpu else None
    # Jit with the sharding, so that no device first holds everything and then sends it.
    init = functools.partial(_init_state, config)
    # The key is an argument, so that every seed finds the same program in the compilation cache.
    key = jax.random.key(config.seed)
    return jax.jit(init, out_shardings=sharding, compiler_options=options)(key)


def abstract_state(config: ConfigDict) -> TrainState:
    """Returns the shapes and dtypes of the state that `config` trains; computes nothing."""
    # The key has only a shape, too, because a real key would start the devices.
    key = jax.eval_shape(jax.random.key, config.seed)
    return jax.eval_shape(functools.partial(_init_state, config), key)


def _init_state(config: ConfigDict, key: Array) -> TrainState:
    model = create(config.model, config.dtype, config.bn_groups)
    side = config.data.patch_size
    images = jnp.zeros((1, side, side, 3))
    # Use inference, because it needs neither a key for dropout nor a batch for statistics.
    variables = model.init(key, images, train=False)
    tx = make_optimizer(config, lambda step: 0.0)  # its state does not depend on the schedule
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=variables["params"],
        batch_stats=variables["batch_stats"],
        # A copy has buffers of its own: the whole state is donated to the step, each buffer once.
        ema=jax.tree.map(jnp.copy, dict(variables)) if config.ema_decay else None,
        opt_state=tx.init(variables["params"]),
    )


def update_ema(ema: dict, variables: dict, step: Array, decay: float) -> dict:
    """Returns the average, moved towards `variables`.

    The decay warms up as (1 + step) / (10 + step), so that a short run's average leaves its start.
    """
    # TensorFlow's moving average does the same with num_updates. The decay is 0.1 at the first
    # step, and 0.99 after about 900 steps.
    keep = jnp.minimum(decay, (1 + step) / (10 + step)).astype(jnp.float32)
    return jax.tree.map(lambda average, new: keep * average + (1 - keep) * new, ema, variables)


def count_params(params) -> int:
    """Returns how many numbers the parameters have."""
    return sum(x.size for x in jax.tree.leaves(params))


def params_digest(params, batch_stats) -> str:
    """Returns the sha256 over parameters and batch statistics, in sorted path order."""
    leaves = jax.tree_util.tree_leaves_with_path({"batch_stats": batch_stats, "params": params})
    # Sort by name, so that the digest stays the same if a library changes the order of fields.
    named = sorted((jax.tree_util.keystr(path), leaf) for path, leaf in leaves)
    digest = hashlib.sha256()
    for name, leaf in named:
        digest.update(name.encode())
        # Hash bits, not rounded values: two runs are exactly the same, or they differ.
        digest.update(np.ascontiguousarray(jax.device_get(leaf)).tobytes())
    return digest.hexdigest()
