"""Signals that stop a run after the step it is in."""

import os
import signal


class StopSignal:
    """Within its block, a SIGINT, SIGTERM, SIGUSR1 or SIGHUP is only recorded, in `signum`.

    SIGHUP comes where a terminal closes. A second SIGINT, which a person sends, acts as if there
    were no block; schedulers and torchrun repeat theirs, and have SIGKILL for what is urgent.
    """

    def __enter__(self):
        names = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP")
        numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
        self.signum = 0
        self.handlers_before = {number: signal.signal(number, self._record) for number in numbers}
        return self

    def __exit__(self, *error):
        for signum, handler in self.handlers_before.items():
            signal.signal(signum, handler)

    def _record(self, signum, frame):
        hint = b""
        if signum == signal.SIGINT:
            hint = b"; once more stops at once"
            signal.signal(signum, self.handlers_before[signum])
        if not self.signum and os.environ.get("RANK", "0") == "0":
            # not print, which a signal may interrupt in the middle of another print
            os.write(2, b"\nstopping after this step" + hint + b"\n")
        self.signum = signum
