"""Searches for the largest batch, in memory that is a known function of the batch."""

from types import SimpleNamespace

import pytest

from bef_jax.configs.default import get_config
from bef_jax.planning import chips, largest_batch
from bef_jax.planning.compiled_step import Figures


def search(memory, first, capacity=1000, unit=8):
    """Returns the batch found, and the batches that were measured for it."""
    asked = []

    def measure(batch):
        asked.append(batch)
        return memory(batch)

    return largest_batch.search(measure, {first: memory(first)}, capacity, unit), asked


@pytest.mark.parametrize("first", [8, 12, 64, 192, 400])
def test_linear_memory_takes_at_most_two_more_measurements(first):
    best, asked = search(lambda batch: 100 + 4 * batch, first)
    assert best == 224  # 225 would fit too, but is no multiple of 8
    assert len(asked) <= 2 and best in asked


def test_memory_with_a_bend_is_searched_within_the_attempts():
    best, asked = search(lambda batch: 100 + 4 * batch + max(0, batch - 128), 16)
    assert best == 200 and len(asked) <= largest_batch.ATTEMPTS
    assert 100 + 4 * best + best - 128 <= 1000 < 100 + 4 * (best + 8) + best - 120


def test_a_refusal_without_a_size_leads_to_smaller_batches():
    best, _ = search(lambda batch: 10 * batch if batch <= 64 else None, 256)
    assert best == 64


def test_no_batch_is_found_if_none_fits():
    assert search(lambda batch: 2000 + batch, 64) == (None, [32, 8])


@pytest.mark.parametrize("first", [64, 256])
def test_a_refused_batch_does_not_fit_even_if_it_needs_less_than_the_chip_has(first, monkeypatch):
    """The compiler leaves programs 31 of v4's 32 GiB; each image needs an eighth of a GiB."""

    def measure(config, mesh, chip):
        size = config.batch_size * 2**27
        return Figures(hbm_bytes=size, seconds=0.0, refused=size > 31 * 2**30)

    monkeypatch.setattr(largest_batch, "measure", measure)
    config, mesh, v4 = get_config(), SimpleNamespace(size=1), chips.by_name("v4")
    config.batch_size = first
    found = largest_batch.find(config, mesh, v4, measure(config, mesh, v4))
    assert found == 31 * 8
