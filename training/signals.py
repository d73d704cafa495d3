"""Signals that stop a run after the step it is in."""

import contextlib
import os
import select
import signal
import socket
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

from training.distributed import is_first_rank, launched_ranks, waiting_seconds

SECONDS_TO_END = 120  # that a process waits for another rank after a signal


class StopSignal:
    """Records SIGINT, SIGTERM, SIGUSR1 and SIGHUP in `signum` instead of ending the process.

    SIGHUP comes when a terminal closes. A signal that is ignored already stays ignored, as SIGHUP
    under nohup. A second SIGINT, which a person sends, acts as outside the block. Other signals
    stay recorded however often they come: schedulers and torchrun repeat them, and send SIGKILL if
    a process takes too long.

    A process that waits for another rank cannot end its step. If the process still waits
    SECONDS_TO_END after the signal, or at a second SIGINT, it ends at once, without a checkpoint.
    """

    def __enter__(self) -> "StopSignal":
        self.prints = is_first_rank()
        names = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP")
        existing = [getattr(signal, name) for name in names if hasattr(signal, name)]
        numbers = [number for number in existing if signal.getsignal(number) != signal.SIG_IGN]
        self.signum = 0
        self.old_handlers: dict[int, Any] = {
            number: signal.signal(number, self._record) for number in numbers
        }
        self.watch = contextlib.ExitStack()
        if launched_ranks().world_size > 1:
            self.watch.enter_context(_watch_signals(set(numbers)))
        return self

    def __exit__(self, *error: object) -> None:
        self.watch.close()
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


@contextlib.contextmanager
def _watch_signals(signums: set[int]) -> Iterator[None]:
    """Run _end_if_waiting in a thread: Python's handlers do not run while the main thread waits."""
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    old_writer = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    thread = threading.Thread(target=_end_if_waiting, args=(reader, signums), daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(old_writer)
        writer.close()  # ends the thread
        thread.join()
        reader.close()


def _end_if_waiting(reader: socket.socket, signums: set[int]) -> None:
    """End the process if it waits for another rank for too long after a signal.

    Args:
        reader: Gets the number of each signal as a byte, and ends with the StopSignal block.
        signums: The signals that end a run.
    """
    first = 0
    since = 0.0
    while True:
        readable, _, _ = select.select([reader], [], [], 0.5)
        received = reader.recv(1) if readable else None
        if received == b"":
            return
        again = False
        if received and received[0] in signums:
            again = first == received[0] == signal.SIGINT
            if not first:
                first = received[0]
                since = time.monotonic()
        waited = min(waiting_seconds(), time.monotonic() - since) if first else 0.0
        if waited > SECONDS_TO_END or (again and waiting_seconds() > 1):
            os.write(2, b"error: another rank does not answer: ended without a checkpoint\n")
            os._exit(128 + first)
