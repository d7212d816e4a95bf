from types import SimpleNamespace

import pytest

from bef_jax.configs.default import get_config
from bef_jax.planning import chips, largest_batch
from bef_jax.planning.compiled_step import Figures


def search(memory, first, capacity=1000, unit=8):
    """The batch found, and those that were measured for it."""
    asked = []

    def measure(batch):
        asked.append(batch)
        return memory(batch)

    return largest_batch.search(measure, {first: memory(first)}, capacity, unit), asked


@pytest.mark.parametrize("first", [8, 12, 64, 192, 400])
def test_a_line_is_found_by_two_measurements_and_a_check(first):
    best, asked = search(lambda batch: 100 + 4 * batch, first)
    assert best == 224  # 225 would fit, and 8 does not divide it
    assert len(asked) <= 2 and best in asked


def test_a_bend_takes_a_further_measurement():
    best, asked = search(lambda batch: 100 + 4 * batch + max(0, batch - 128), 16)
    assert best == 200 and len(asked) <= largest_batch.ATTEMPTS
    assert 100 + 4 * best + best - 128 <= 1000 < 100 + 4 * (best + 8) + best - 120


def test_a_compiler_that_only_refuses_is_asked_for_less():
    best, _ = search(lambda batch: 10 * batch if batch <= 64 else None, 256)
    assert best == 64


def test_nothing_fits():
    assert search(lambda batch: 2000 + batch, 64) == (None, [32, 8])


@pytest.mark.parametrize("first", [64, 256])
def test_a_refused_batch_does_not_fit_though_it_wants_less_than_the_chip_has(first, monkeypatch):
    """A compiler for v4 that leaves programs 31 of its 32 GiB; a batch needs an eighth each."""

    def measure(config, mesh, chip):
        size = config.batch_size * 2**27
        return Figures(hbm_bytes=size, seconds=0.0, refused=size > 31 * 2**30)

    monkeypatch.setattr(largest_batch, "measure", measure)
    config, one, v4 = get_config(), SimpleNamespace(size=1), chips.by_name("v4")
    config.batch_size = first
    found = largest_batch.find(config, one, v4, measure(config, one, v4))
    assert found == 31 * 8
