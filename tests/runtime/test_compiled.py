"""Memory and costs of compiled programs, against numbers from the sizes of their arrays."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from bef_jax.runtime.compiled import bytes_accessed, flops, memory_bytes


@pytest.fixture(autouse=True)
def cpu():
    """Compiles for the CPU also where there is a GPU or a TPU, whose compilers add to the costs."""
    with jax.default_device(jax.devices("cpu")[0]):
        yield


def test_memory_counts_a_donated_array_once():
    x = jnp.zeros((1000, 1000))
    step = jax.jit(lambda x, y: x + y, donate_argnums=0)
    needed = memory_bytes(step.lower(x, x).compile())
    # y, and x, whose memory the result reuses
    assert needed == pytest.approx(2 * x.nbytes, rel=0.01)


def test_memory_adds_up_all_that_a_device_holds():
    sizes = {"argument": 100, "output": 20, "alias": 3, "temp": 4000, "generated_code": 50000}
    analysis = SimpleNamespace(**{f"{k}_size_in_bytes": size for k, size in sizes.items()})
    assert memory_bytes(SimpleNamespace(memory_analysis=lambda: analysis)) == 54117


def test_memory_that_is_not_reported_is_none():
    assert memory_bytes(SimpleNamespace(memory_analysis=lambda: None)) is None


def test_flops_and_bytes_of_a_matrix_product():
    x = jnp.zeros((100, 200))
    product = jax.jit(lambda x: x @ x.T).lower(x).compile()
    assert flops(product) == pytest.approx(2 * 100 * 200 * 100, rel=0.01)
    assert bytes_accessed(product) >= x.nbytes + 4 * 100 * 100


@pytest.mark.parametrize("costs", [{"flops": -1.0, "bytes accessed": -1.0}, {}, None])
def test_costs_that_are_not_reported_are_none(costs):
    compiled = SimpleNamespace(cost_analysis=lambda: costs)
    assert flops(compiled) is bytes_accessed(compiled) is None
