"""Sends real signals to this process; only the other processes of a run are simulated."""

import logging
import os
import signal
import threading

import jax
import pytest
from jax.experimental import multihost_utils

from bef_jax.runtime.interrupt import SIGNALS, Interrupt


def send(signum):
    os.kill(os.getpid(), signum)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_only_requests_a_stop(signum, caplog):
    with caplog.at_level(logging.WARNING), Interrupt() as interrupt:
        assert not interrupt.requested
        send(signum)
        assert interrupt.requested
    assert signal.Signals(signum).name in caplog.text


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_a_second_sigint_stops_at_once(first):
    with pytest.raises(KeyboardInterrupt), Interrupt():
        send(first)
        send(signal.SIGINT)


def test_a_second_sigterm_does_not_stop_at_once():
    """Launchers may repeat SIGTERM during the save."""
    with Interrupt() as interrupt:
        send(signal.SIGTERM)
        send(signal.SIGTERM)
        assert interrupt.requested


def test_handlers_are_restored():
    before = [signal.getsignal(signum) for signum in SIGNALS]
    with Interrupt():
        for signum, handler in zip(SIGNALS, before, strict=True):
            assert signal.getsignal(signum) != handler
    assert [signal.getsignal(signum) for signum in SIGNALS] == before
    with pytest.raises(RuntimeError), Interrupt():
        raise RuntimeError
    assert [signal.getsignal(signum) for signum in SIGNALS] == before


def test_other_threads_catch_nothing():
    seen = []

    def work():
        with Interrupt() as interrupt:
            seen.append(([signal.getsignal(signum) for signum in SIGNALS], interrupt.requested))

    before = [signal.getsignal(signum) for signum in SIGNALS]
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(before, False)]


@pytest.mark.parametrize("agreed", [1, 5, 7])
def test_each_process_of_several_asks_about_every_step(agreed, monkeypatch):
    """A call may take several steps, and the first question may come after the agreed step."""
    asked = []

    def reached(step):
        asked.append(step)
        return step == agreed

    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(multihost_utils, "reached_preemption_sync_point", reached)
    interrupt = Interrupt()
    stopped = next(step for step in (3, 4, 6, 8) if interrupt.should_stop_at(step))
    assert stopped == {1: 3, 5: 6, 7: 8}[agreed]
    assert asked == list(range(agreed + 1))


def test_in_a_run_of_several_processes_jax_handles_sigterm(monkeypatch):
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    before = signal.getsignal(signal.SIGTERM)
    with Interrupt():
        assert signal.getsignal(signal.SIGTERM) == before
