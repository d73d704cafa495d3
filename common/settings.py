"""Settings of a script: a dataclass whose fields are also flags."""

import argparse
import dataclasses
import difflib
import inspect
import math
import re
import textwrap
from typing import get_args, get_origin, get_type_hints


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


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"error: {message} (python {self.prog} --help lists the flags)\n")


def _number(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError
    return value
