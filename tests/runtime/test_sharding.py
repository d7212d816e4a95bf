"""Shardings of the shapes of a tree; rounding up against a search through all numbers."""

import jax
import jax.numpy as jnp
import pytest

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
