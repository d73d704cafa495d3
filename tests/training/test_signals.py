"""StopSignal records signals instead of ending the process."""

import os
import signal

import pytest

from training.signals import StopSignal


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
def test_a_repeated_signal_of_a_scheduler_is_recorded(signum):
    before = signal.getsignal(signum)
    with StopSignal() as stop:
        assert stop.signum == 0
        for _ in range(3):
            os.kill(os.getpid(), signum)
        assert stop.signum == signum
    assert signal.getsignal(signum) is before


@pytest.mark.parametrize("signum", [signal.SIGHUP, signal.SIGINT])  # nohup; sh -c "python ... &"
def test_a_signal_that_the_caller_ignores_stays_ignored(signum):
    before = signal.signal(signum, signal.SIG_IGN)
    try:
        with StopSignal() as stop:
            os.kill(os.getpid(), signum)
            assert stop.signum == 0
        assert signal.getsignal(signum) == signal.SIG_IGN
    finally:
        signal.signal(signum, before)


def test_a_second_ctrl_c_raises_keyboard_interrupt(capfd):
    with pytest.raises(KeyboardInterrupt), StopSignal() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.signum == signal.SIGINT
        assert "once more stops at once" in capfd.readouterr().err
        os.kill(os.getpid(), signal.SIGINT)
