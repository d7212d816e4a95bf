"""The state in a few long vectors, which a GPU updates in a few kernels.

EfficientNet-B3 has 340 arrays of parameters and 156 of batch statistics, and a step also updates
moments and averages. One kernel for each takes longer to launch than to run. So the leaves of one
name (all kernels, all biases, all means, ...) are put into vectors, one after the other. The rules
of `optim` go by these names, so that an optimiser works on vectors as it does on leaves. The
network reads slices of the vectors. XLA converts a whole vector to bfloat16 at once, and most of
its matrix products take their slice where it lies.

Checkpoints, evaluation and digests have the unpacked state.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh
from ml_collections import ConfigDict

from bef_jax.runtime import sharding
from bef_jax.training.state import TrainState, abstract_state

# {number of the vector: {name of its leaves: [all of them]}}, such as {"0": {"kernel": ...}}.
Vectors = dict[str, dict[str, Array]]

# A vector ends with the leaf that brings it to this many numbers. With one vector for each name, no
# gradient could be packed, and its memory be used again, before the last gradient is computed.
_LENGTH = 2**20


@dataclasses.dataclass(frozen=True)
class Packing:
    """How training on some devices holds its state.

    Attributes:
        mesh: the devices.
        pack: returns the state as the training step takes it.
        unpack: returns the state as everything else takes it.
    """

    mesh: Mesh
    pack: Callable[[TrainState], TrainState]
    unpack: Callable[[TrainState], TrainState]

    def shapes(self, state: TrainState) -> TrainState:
        """Returns the shapes and shardings of the packed state, and packs nothing."""
        packed = jax.eval_shape(self.pack, state)
        return sharding.with_sharding(packed, sharding.replicated(self.mesh))


def make_packing(config: ConfigDict, mesh: Mesh) -> Packing:
    """Returns the packing for a mesh of GPUs; for others, one that leaves the state as it is.

    A CPU and a TPU launch no kernels, and each slice would cost them a copy. Fine-tuning that goes
    by the names of modules (optim.freeze, layer_decay, head_only_steps) needs the leaves apart.
    """
    optim = config.optim
    by_module = optim.freeze or optim.layer_decay != 1 or optim.head_only_steps
    with jax.set_mesh(mesh):
        if by_module or not sharding.for_gpu():
            return Packing(mesh, pack=lambda state: state, unpack=lambda state: state)
    everywhere = sharding.replicated(mesh)
    unpack = functools.partial(unpack_state, like=abstract_state(config))
    return Packing(
        mesh,
        pack=jax.jit(pack_state, out_shardings=everywhere),
        unpack=jax.jit(unpack, out_shardings=everywhere),
    )


def is_packed(state: TrainState) -> bool:
    """Returns whether `pack_state` made the state."""
    return "0" in state.params


def with_leaves(state: TrainState, config: ConfigDict) -> TrainState:
    """Returns the state with parameters and batch statistics as the network takes them."""
    if not is_packed(state):
        return state
    pairs = zip(_variables(state), _variables(abstract_state(config)), strict=True)
    params, batch_stats = (unpack(vectors, like) for vectors, like in pairs)
    return state.replace(params=params, batch_stats=batch_stats)


def pack_like(state: TrainState, tree: dict) -> dict:
    """Returns gradients or batch statistics, packed if the state is."""
    return pack(tree) if is_packed(state) else tree


def pack_state(state: TrainState) -> TrainState:
    """Packs each part of a state that is built like its parameters or its batch statistics."""
    return _map_parts(state, {jax.tree.structure(x): pack for x in _variables(state)})


def unpack_state(state: TrainState, like: TrainState) -> TrainState:
    """Undoes `pack_state`; `like` has the shapes of the result."""
    pairs = zip(_variables(state), _variables(like), strict=True)
    functions = {jax.tree.structure(x): functools.partial(unpack, like=y) for x, y in pairs}
    return _map_parts(state, functions)


def _variables(state: TrainState) -> tuple[dict, dict]:
    return state.params, state.batch_stats


def _map_parts(state: TrainState, functions: dict) -> TrainState:
    """Applies to each part of a state the function for its structure, if there is one."""

    def is_part(tree) -> bool:
        return jax.tree.structure(tree) in functions

    def apply(tree):
        return functions[jax.tree.structure(tree)](tree) if is_part(tree) else tree

    return jax.tree.map(apply, state, is_leaf=is_part)


def pack(tree: dict) -> Vectors:
    """Returns the vectors of parameters, of their gradients or of batch statistics."""
    vectors: dict[str, dict[str, list[Array]]] = {}
    for (number, name, _), leaf in zip(_places(tree), jax.tree.leaves(tree), strict=True):
        vectors.setdefault(number, {}).setdefault(name, []).append(leaf.reshape(-1))
    return {n: {k: jnp.concatenate(v) for k, v in named.items()} for n, named in vectors.items()}


def unpack(vectors: Vectors, like: dict) -> dict:
    """Undoes `pack`; `like` has the shapes of the result."""
    leaves, structure = jax.tree.flatten(like)
    parts = zip(_places(like), leaves, strict=True)
    return structure.unflatten(
        vectors[number][name][start : start + leaf.size].reshape(leaf.shape)
        for (number, name, start), leaf in parts
    )


def _places(tree: dict) -> list[tuple[str, str, int]]:
    """Returns where each leaf is packed: the vector's number and name, and the leaf's start."""
    ends: dict[str, tuple[int, int]] = {}  # {name: (number of the last vector, its length)}
    places = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = path[-1].key
        number, start = ends.get(name, (0, 0))
        if start >= _LENGTH:
            number, start = number + 1, 0
        ends[name] = number, start + leaf.size
        places.append((str(number), name, start))
    return places
