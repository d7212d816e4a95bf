"""The clock of a run against sums made by hand; the tests move the time themselves."""

import pytest

from bef_jax.training import clock


class Time:
    """Stands in for the module `time`; a test moves `now`."""

    def __init__(self):
        self.now = 100.0

    def perf_counter(self):
        return self.now


@pytest.fixture
def time(monkeypatch):
    fake = Time()
    monkeypatch.setattr(clock, "time", fake)
    return fake


def test_seconds_add_up_by_name(time):
    watch = clock.Clock()
    for seconds in (2, 3):
        with watch.measure("save"):
            time.now += seconds
        time.now += 10
    assert watch.seconds("save") == 5
    assert watch.seconds("wall") == 25
    assert watch.seconds("never") == 0


def test_a_measurement_that_still_runs_counts(time):
    watch = clock.Clock()
    with watch.measure("loop"):
        time.now += 4
        assert watch.seconds("loop") == 4
        assert watch.snapshot() == {"loop": 4, "wall": 4}
    assert watch.seconds("loop") == 4


def test_a_measurement_that_an_error_ends_still_counts(time):
    watch = clock.Clock()
    with pytest.raises(RuntimeError), watch.measure("loop"):
        time.now += 4
        raise RuntimeError
    time.now += 1
    assert watch.seconds("loop") == 4


def test_training_is_the_loop_without_evaluations_and_saves(time):
    watch = clock.Clock()
    with watch.measure("loop"):
        time.now += 10
        with watch.measure("evaluate"):
            time.now += 3
        with watch.measure("save"):
            time.now += 2
    assert watch.training_seconds() == 10


def test_a_restarted_run_goes_on_counting(time):
    first = clock.Clock()
    with first.measure("loop"):
        time.now += 7
    snapshot = first.snapshot()
    time.now += 1000  # between the runs, so no clock counts it
    second = clock.Clock()
    time.now += 1
    with second.measure("loop"):
        second.restore(snapshot)
        time.now += 2
    assert second.seconds("loop") == 9
    assert second.seconds("wall") == 10
    assert snapshot == {"loop": 7, "wall": 7}


def test_laps_divide_the_time_since_the_start(time):
    laps = clock.Laps(start=90.0)
    for name, seconds in (("imports", 2.5), ("data", 0), ("state", 7.5)):
        time.now += seconds
        laps.mark(name)
    assert str(laps) == "20.0 s after the start: imports 12.5, data 0.0, state 7.5"
    assert str(clock.Laps()) == "0.0 s after the start: "
