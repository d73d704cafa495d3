"""What the scripts share: constants that are also flags, errors for people, whole files."""

import argparse
import contextlib
import dataclasses
import difflib
import errno
import faulthandler
import importlib
import inspect
import json
import math
import os
import re
import sys
import textwrap
from pathlib import Path
from typing import get_args, get_origin, get_type_hints

import numpy as np

try:
    import fcntl
except ImportError:  # Windows: there, two at once aren't kept apart
    fcntl = None


def parse_flags(cls, doc: str, defaults=None):
    """Fills the dataclass `cls` from --field value flags; each field's comment is its help.

    Returns a `cls`; flags that aren't given keep their value in `defaults`, another `cls`. Of a
    flag given twice the last value counts, or all, where it takes several. An unknown flag or a
    value of the wrong type ends the program with a line that names it, code 2.
    """
    parser = _Parser(
        description=doc, allow_abbrev=False, formatter_class=argparse.RawTextHelpFormatter
    )
    comments = dict(re.findall(r"^    (\w+):.*?  # (.*)$", inspect.getsource(cls), re.MULTILINE))
    types, defaults = get_type_hints(cls), defaults or cls()
    for field in dataclasses.fields(cls):
        default, kind = getattr(defaults, field.name), types[field.name]
        several = get_origin(kind) is tuple
        kind = next((t for t in get_args(kind) if t is not type(None)), kind)  # "int | None": int
        shown = "" if default in ("", (), None) or default is False else f" [{default!r}]"
        parser.add_argument(
            f"--{field.name}",
            **dict(action="store_true")
            if kind is bool
            else dict(type=_number if kind is float else kind, metavar=kind.__name__.upper()),
            **dict(nargs="+", action="extend") if several else {},
            default=argparse.SUPPRESS,
            help=f"{comments[field.name]}{shown}".replace("%", "%%"),
        )
    given, unknown = parser.parse_known_args()
    if unknown:
        flags = [f"--{field.name}" for field in dataclasses.fields(cls)]
        parser.error(f"unknown {unknown[0]}{near(unknown[0].split('=')[0], flags)}")
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in vars(given).items()}
    return dataclasses.replace(defaults, **given)


def check(config, choices=None, limits=None, without=None, needs=None) -> None:
    """Raises ValueError for a value that can't be used, by four tables of the config's fields:

    choices: the texts that one may be. limits: (least, most) of a number; elsewhere 0 and, for a
    whole one, 2**31 - 1. without: what has no effect beside it. needs: the flag that it has no
    effect without.
    """
    for name, value in vars(config).items():
        known = (choices or {}).get(name)
        if known and value not in known:
            names = ", ".join(text or '""' for text in known)
            raise ValueError(f"{name} is one of {names}, not {value!r}{near(value, known)}")
        if isinstance(value, (int, float)):
            usual = (0, math.inf if isinstance(value, float) else 2**31 - 1)
            least, most = (limits or {}).get(name, usual)
            if not least <= value <= most:
                bound = f"at least {least}" if value < least else f"at most {most}"
                raise ValueError(f"{name} must be {bound}, not {value}")
    fields = dataclasses.fields(config)
    given = [field.name for field in fields if getattr(config, field.name) != field.default]
    for name in given:
        for other in given:
            if other in (without or {}).get(name, ()):
                raise ValueError(f"--{other} has no effect beside --{name}: leave one out")
        need = (needs or {}).get(name, name)
        if need.split()[0] not in given:
            raise ValueError(f"--{name} has no effect without --{need}")


def near(name: str, known) -> str:
    """The one of `known` that `name` was probably meant for, as the end of a sentence; or ""."""
    return "".join(
        f"; did you mean {found}?" for found in difflib.get_close_matches(name, known, 1)
    )


def print_flags(config) -> None:
    """The values in use, on as few lines as they need."""
    values = {k: v for k, v in dataclasses.asdict(config).items() if v not in (None, "", (), False)}
    shown = {float: "{:g}".format, tuple: " ".join}
    text = " ".join(f"{k}={shown.get(type(v), str)(v)}" for k, v in values.items())
    print(textwrap.fill(text, width=100))


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


def folder_name(name: str, flag: str) -> str:
    """`name`, where it can be that of a folder inside another. Raises ValueError elsewhere."""
    if Path(name).name != name or name in ("", ".."):
        raise ValueError(f"{name!r} can't be the name of a folder: choose another {flag} NAME")
    return name


@contextlib.contextmanager
def atomic_write(path: Path, by: str = ""):
    """A binary file to write to; `path` changes once all of it is on the disk, or not at all.

    by: tells apart those who may write it at the same time. What a killed one leaves behind,
    path + by + ".tmp", only the same one writes over.
    """
    temporary = path.with_name(path.name + by + ".tmp")
    try:
        temporary.unlink(missing_ok=True)  # in a stranger's folder, it may lead out of it
        with open(temporary, "xb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if error.filename in (None, str(temporary)):  # a failed write doesn't know it
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def read_json(path: Path):
    """What a JSON file holds. Raises OSError, or ValueError that says what is wrong with it."""
    if path.exists() and not path.is_file():  # a pipe, say, would keep us waiting
        raise ValueError(f"{path} is no file")
    data = path.read_bytes()
    try:
        return json.loads(data.decode())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error}") from None


def lock(file, shared=False) -> bool:
    """Takes an open file for this process alone, until it closes it or ends, in whatever way.
    False where another process has it. shared: with others that take it so, once nobody has it
    alone."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_SH if shared else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def optional(module: str, what: str, package: str = ""):
    """Imports an optional package. Raises ValueError that tells how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError:
        package = package or module.split(".")[0]
        raise ValueError(f"{what} needs a package: pip install {package}") from None


def mix(x):
    """splitmix64's finaliser: every bit of an array of 64-bit integers changes every bit of the
    result, uint64."""
    x = x.astype(np.uint64)
    x ^= x >> np.uint64(30)
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return x


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"error: {message} (python {self.prog} --help lists the flags)\n")


def _number(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError
    return value
