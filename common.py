"""What the scripts share: constants that are also flags, errors for people, whole files."""

import argparse
import contextlib
import dataclasses
import errno
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


def parse_flags(cls, doc: str, defaults=None):
    """Fills the dataclass `cls` from --field value flags; each field's comment is its help.

    Returns a `cls`; flags that aren't given keep their value in `defaults`, another `cls`. An
    unknown flag or a value of the wrong type ends the program with a line that names it, code 2.
    """
    parser = _Parser(
        description=doc, allow_abbrev=False, formatter_class=argparse.RawTextHelpFormatter
    )
    comments = dict(re.findall(r"^    (\w+):.*?  # (.*)$", inspect.getsource(cls), re.MULTILINE))
    types = get_type_hints(cls)
    for field in dataclasses.fields(cls):
        default = field.default if defaults is None else getattr(defaults, field.name)
        kind = types[field.name]
        several = get_origin(kind) is tuple
        kind = next((t for t in get_args(kind) if t is not type(None)), kind)  # "int | None": int
        parser.add_argument(
            f"--{field.name}",
            **dict(action="store_true")
            if kind is bool
            else dict(type=_finite if kind is float else kind, metavar=kind.__name__.upper()),
            **dict(nargs="+") if several else {},
            default=default,
            help=f"{comments[field.name]} [{default!r}]".replace("%", "%%"),
        )
    values = vars(parser.parse_args())
    return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


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
    sys.stdout.reconfigure(errors="replace")  # a terminal may not have every character
    try:
        code = main() or 0
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of our output, such as head, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 128 + 13  # as a shell reports SIGPIPE
    except KeyboardInterrupt:
        code = 130  # as a shell reports Ctrl-C
    except (ValueError, OSError) as error:
        print(f"error: {_sentence(error)}", file=sys.stderr, flush=True)
        code = 1
    if os.environ.get("WORLD_SIZE", "1") != "1":
        # one of several, without taking Python down in order: gloo's threads may hold the last
        # tensors, and abort when they let them go (pytorch/pytorch#179291)
        sys.stdout.flush()
        os._exit(code)
    sys.exit(code)


def _sentence(error: Exception) -> str:
    if not (isinstance(error, OSError) and error.errno and error.filename):
        return str(error)  # raised by us
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    remedy = "; make room there, or choose another folder, and run it again" if full else ""
    return f"{error.filename}: {error.strerror}{remedy}"


def folder_name(name: str, flag: str) -> str:
    """`name`, where it can be that of a folder inside another. Raises ValueError elsewhere."""
    if Path(name).name != name or name in ("", ".."):
        raise ValueError(f"{name!r} can't be the name of a folder: choose another {flag} NAME")
    return name


@contextlib.contextmanager
def atomic_write(path: Path):
    """A binary file to write to; `path` changes once all of it is on the disk, or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.unlink(missing_ok=True)  # in a stranger's folder, it may lead out of it
        with open(temporary, "xb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except OSError as error:
        error.filename = error.filename or str(path)  # a failed write doesn't know it
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


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError
    return value
