"""A program that is asked to end does, wherever it is."""

import gc
import os
import signal
import sys
import time
import weakref

import pytest

from torchmdnet.config.stopping import Stopped, stop_signals


class Heavy:
    """Something that is being destroyed when the signal comes."""

    number = signal.SIGINT

    def __del__(self):
        os.kill(os.getpid(), self.number)
        time.sleep(0)


def destroy(number):
    heavy = Heavy()
    heavy.number = number


def call_back(number):
    heavy = Heavy()
    heavy.number = signal.SIGCONT
    watched = weakref.ref(heavy, lambda _: os.kill(os.getpid(), number))
    del heavy
    gc.collect()
    del watched


def work(where, number):
    where(number)
    time.sleep(5.0)
    pytest.fail("the signal was lost")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("where", [destroy, call_back])
def test_a_signal_that_falls_where_errors_are_dropped_is_heard_a_moment_later(where, number, capsys):
    with stop_signals(), pytest.raises(Stopped) as stopped:
        work(where, number)
    assert stopped.value.number == number
    assert "Traceback" not in capsys.readouterr().err


def test_other_dropped_errors_are_shown_as_before():
    before, told = sys.unraisablehook, []
    sys.unraisablehook = told.append
    try:
        with stop_signals():
            sys.unraisablehook(type("Dropped", (), {"exc_value": ValueError("x")}))
        assert len(told) == 1
    finally:
        sys.unraisablehook = before
