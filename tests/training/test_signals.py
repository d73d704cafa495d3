import os
import signal

import pytest

from training.signals import StopSignal


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
def test_a_schedulers_signal_is_recorded_however_often_it_comes(signum):
    before = signal.getsignal(signum)
    with StopSignal() as stop:
        assert stop.signum == 0
        for _ in range(3):
            os.kill(os.getpid(), signum)
        assert stop.signum == signum
    assert signal.getsignal(signum) is before


def test_a_persons_second_signal_acts_at_once(capfd):
    with pytest.raises(KeyboardInterrupt), StopSignal() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.signum == signal.SIGINT
        assert "once more stops at once" in capfd.readouterr().err
        os.kill(os.getpid(), signal.SIGINT)
