import pytest

from bef_jax.runtime.sharding import round_up


@pytest.mark.parametrize("multiple", [1, 3, 8])
@pytest.mark.parametrize("n", range(18))
def test_rounding_up_finds_the_nearest_multiple(n, multiple):
    assert round_up(n, multiple) == next(x for x in range(n, 99) if x % multiple == 0)
