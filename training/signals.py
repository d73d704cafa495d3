"""Signals that stop a run after the step it is in."""

import os
import signal
from types import FrameType
from typing import Any

from training.distributed import is_first_rank


class StopSignal:
    """Records SIGINT, SIGTERM, SIGUSR1 and SIGHUP in `signum` instead of ending the process.

    SIGHUP comes when a terminal closes. A second SIGINT, which a person sends, acts as it would
    outside the block. Other signals stay recorded however often they come: schedulers and torchrun
    repeat them, and end an urgent process by SIGKILL.
    """

    def __enter__(self) -> "StopSignal":
        self.prints = is_first_rank()
        names = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP")
        numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
        self.signum = 0
        self.old_handlers: dict[int, Any] = {
            number: signal.signal(number, self._record) for number in numbers
        }
        return self

    def __exit__(self, *error: object) -> None:
        for signum, handler in self.old_handlers.items():
            signal.signal(signum, handler)

    def _record(self, signum: int, frame: FrameType | None) -> None:
        hint = b""
        if signum == signal.SIGINT:
            hint = b"; once more stops at once"
            signal.signal(signum, self.old_handlers[signum])
        if not self.signum and self.prints:
            # not print, which a signal may interrupt in the middle of another print
            os.write(2, b"\nstopping after this step" + hint + b"\n")
        self.signum = signum
