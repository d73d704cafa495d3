"""Runs a script: errors for people, exit codes."""

import contextlib
import errno
import faulthandler
import os
import sys


def run(main) -> None:
    """Runs a script's main(); an error that is the user's to mend becomes one line, exit code 1.

    ValueError and OSError carry messages for people (what, where, what to do); anything else is a
    bug of ours and keeps its traceback.
    """
    for name in ("stdin", "stdout", "stderr"):  # one that is closed is as good as an empty one
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))
    with contextlib.suppress(OSError):  # standard error may be no file
        faulthandler.enable()  # a crash in C code tells where
    sys.stdout.reconfigure(errors="replace")  # a terminal may not have every character
    try:
        code = main() or 0
        sys.stdout.flush()
    except SystemExit as stop:  # argparse's
        code = stop.code or 0
    except BrokenPipeError:  # the reader of our output, such as head, has gone
        code = 128 + 13  # as a shell reports SIGPIPE
    except KeyboardInterrupt:
        code = 130  # as a shell reports Ctrl-C
    except (ValueError, OSError, MemoryError) as error:
        with contextlib.suppress(OSError):
            print(f"error: {_sentence(error)}", file=sys.stderr, flush=True)
        code = 1
    try:
        sys.stdout.flush()
    except OSError:  # Python would try again, and complain
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = code or 1
    if os.environ.get("WORLD_SIZE", "1") != "1":
        # one of several, without taking Python down in order: gloo's threads may hold the last
        # tensors, and abort when they let them go (pytorch/pytorch#179291)
        os._exit(code)
    sys.exit(code)


def _sentence(error: Exception) -> str:
    text = str(error)  # raised by us
    if isinstance(error, MemoryError):
        text = f"there is not enough memory: {text}"
    elif isinstance(error, OSError) and error.errno and error.filename:
        remedy = ""
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            remedy = "; make room there, or choose another folder, and run it again"
        elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            remedy = "; get the right to, or choose another folder"
        text = f"{error.filename}: {error.strerror}{remedy}"
    return " ".join(text.splitlines())  # a file's name may have several
