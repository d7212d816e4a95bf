"""Shardings of the shapes of a tree, what a traced program is for, and rounding up."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, Mesh

from bef_jax.runtime import sharding


def test_shapes_of_a_tree_get_a_sharding_and_no_memory():
    everywhere = sharding.replicated(sharding.make_mesh())
    tree = {"kernel": jax.ShapeDtypeStruct((10**9, 10**9), jnp.bfloat16), "step": jnp.int32(3)}
    found = sharding.with_sharding(tree, everywhere)
    assert found == {
        "kernel": jax.ShapeDtypeStruct((10**9, 10**9), jnp.bfloat16, sharding=everywhere),
        "step": jax.ShapeDtypeStruct((), jnp.int32, sharding=everywhere),
    }


@pytest.mark.parametrize("multiple", [1, 3, 8])
@pytest.mark.parametrize("n", range(18))
def test_rounding_up_finds_the_nearest_multiple(n, multiple):
    assert sharding.round_up(n, multiple) == next(x for x in range(n, 99) if x % multiple == 0)


def traced(mesh) -> bool:
    """What a program that is traced for `mesh` is told."""
    answers = []
    with jax.sharding.use_abstract_mesh(mesh):
        jax.eval_shape(lambda: answers.append(sharding.for_gpu()))
    return answers.pop()


@pytest.mark.parametrize(("platform", "expected"), [("gpu", True), ("tpu", False), ("cpu", False)])
def test_the_mesh_decides_not_this_machine(platform, expected):
    device = AbstractDevice("any", None, platform)
    mesh = AbstractMesh((2,), ("data",), abstract_device=device)
    assert traced(mesh) == expected


def test_without_a_mesh_the_answer_is_no():
    assert not sharding.for_gpu()


def test_a_mesh_of_this_machines_cpu():
    with jax.set_mesh(Mesh(np.array(jax.devices("cpu")[:1]), ("data",))):
        assert not sharding.for_gpu()
