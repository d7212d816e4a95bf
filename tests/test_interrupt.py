import logging
import os
import signal
import threading

import pytest

from bef_jax.interrupt import SIGNALS, Interrupt


def send(sign):
    os.kill(os.getpid(), sign)


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_only_asks(sign, caplog):
    with caplog.at_level(logging.WARNING), Interrupt() as interrupt:
        assert not interrupt.requested
        send(sign)
        assert interrupt.requested
    assert signal.Signals(sign).name in caplog.text


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_a_second_sigint_stops_at_once(first):
    with pytest.raises(KeyboardInterrupt), Interrupt():
        send(first)
        send(signal.SIGINT)


def test_a_second_sigterm_does_not():
    """Launchers repeat it while the save is under way."""
    with Interrupt() as interrupt:
        send(signal.SIGTERM)
        send(signal.SIGTERM)
        assert interrupt.requested


def test_handlers_are_given_back():
    before = [signal.getsignal(sign) for sign in SIGNALS]
    with Interrupt():
        assert all(signal.getsignal(sign) != old for sign, old in zip(SIGNALS, before, strict=True))
    assert [signal.getsignal(sign) for sign in SIGNALS] == before
    with pytest.raises(RuntimeError), Interrupt():
        raise RuntimeError
    assert [signal.getsignal(sign) for sign in SIGNALS] == before


def test_other_threads_catch_nothing():
    seen = []

    def work():
        with Interrupt() as interrupt:
            seen.append(([signal.getsignal(sign) for sign in SIGNALS], interrupt.requested))

    before = [signal.getsignal(sign) for sign in SIGNALS]
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(before, False)]
