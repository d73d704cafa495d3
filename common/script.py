"""Scripts: exit codes, and errors as one line instead of a traceback."""

import contextlib
import errno
import faulthandler
import os
import sys
from collections.abc import Callable

_shuts_down = True  # whether the interpreter shuts down at the end of a script


def end_without_shutdown() -> None:
    """Make `run_script` end the process at once, without the interpreter's shutdown.

    The shutdown takes time, and threads of a library may not survive it. The caller says why.
    """
    global _shuts_down
    _shuts_down = False


def run_script(main: Callable[[], int | None]) -> None:
    """Run the `main()` of a script and end the process with its exit code.

    A ValueError, OSError or MemoryError is printed as one line: `error: ...`, exit code 1. The
    message of these errors says what is wrong, where, and what to do. Any other exception is a
    bug of the project and keeps its traceback.

    Args:
        main: Function without arguments that returns an exit code, or None for 0.

    Raises:
        SystemExit: The script has ended. The exit code is 130 after Ctrl-C and 141 after a broken
            pipe, as in a shell. After end_without_shutdown, the process ends without this
            exception.
    """
    for name in ("stdin", "stdout", "stderr"):  # None if the stream was closed
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))
    with contextlib.suppress(OSError):  # standard error may have no file descriptor
        faulthandler.enable()  # print a traceback of a crash in C code
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal may not have every character
    try:
        code = main() or 0
        sys.stdout.flush()
    except SystemExit as stop:  # from parse_settings
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BrokenPipeError:  # the reader of the output, such as head, is gone
        code = 128 + 13  # as a shell reports SIGPIPE
    except KeyboardInterrupt:
        code = 128 + 2  # as a shell reports SIGINT
    except (ValueError, OSError, MemoryError) as error:
        with contextlib.suppress(OSError):
            print(f"error: {_message(error)}", file=sys.stderr, flush=True)
        code = 1
    try:
        sys.stdout.flush()
    except OSError:  # the interpreter would flush again and print a traceback
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = code or 1
    if not _shuts_down:
        os._exit(code)
    sys.exit(code)


def _message(error: Exception) -> str:
    """Return an error as one line."""
    if isinstance(error, MemoryError):
        text = f"there is not enough memory: {error}"
    elif isinstance(error, OSError) and error.errno and error.filename:
        text = f"{error.filename}: {error.strerror}{_remedy(error.errno)}"
    else:
        text = str(error)
    return " ".join(text.splitlines())  # a file name may contain line breaks


def _remedy(number: int) -> str:
    """Return the remedy for an error of the operating system, as the end of a sentence."""
    if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return "; make room there, or choose another folder, and run the command again"
    if number in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "; change the permissions, or choose another folder"
    return ""
