"""The settings of a script: a dataclass whose fields are also flags of the command line.

`tyro` parses the flags and writes the help text from the comments in the dataclass. The checks of
ranges and of flags that exclude each other are ours.
"""

import dataclasses
import difflib
import math
import os
import re
import sys
import textwrap
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NoReturn, TypeVar, get_origin, get_type_hints

import tyro
import tyro._errors  # not a public module: requirements.txt pins tyro's version exactly

Settings = TypeVar("Settings")
Number = TypeVar("Number", int, float)
LARGEST_INT = 2**31 - 1

_number_types = tyro.constructors.ConstructorRegistry()


def parse_settings(
    cls: type[Settings],
    doc: str,
    defaults: Settings | None = None,
    other_names: Mapping[str, str] | None = None,
) -> Settings:
    """Return the settings that the command line gives.

    Each field is a flag of the same name: `--name value` or `--name=value`. A `bool` field is a
    flag without a value, `--name` or `--no_name`. A tuple takes several values. The trailing
    comment of a field is its help text. Of a scalar flag that is given twice, the last value
    counts; the values of a tuple that is given twice are joined.

    A wrong flag or value ends the program with one line on standard error and exit code 2.

    Args:
        cls: Class of the settings, a dataclass. Field types are `int`, `float`, `str`, `bool`,
            `Literal`, tuples of these, and each of them `| None`.
        doc: Docstring of the script. `--help` prints this text above the flags.
        defaults: Values of the flags that are not given; None for the defaults of `cls`.
        other_names: Name that other programs have for a field -> name of the field. Such a name is
            an error, too; the message suggests the field.

    Returns:
        An instance of `cls`. All numbers are finite.
    """
    types = get_type_hints(cls)
    flags = [f"--{name}" for name in types]
    tuple_flags = {f"--{name}" for name, kind in types.items() if get_origin(kind) is tuple}
    with tyro._errors.on_parse_error(
        lambda event: _usage_error(_reason(event, flags, other_names or {}))
    ):
        return tyro.cli(
            cls,
            description=doc,
            args=_join_tuples(sys.argv[1:], tuple_flags),
            default=cls() if defaults is None else defaults,
            use_underscores=True,
            config=(tyro.conf.DisallowNone,),
            registry=_number_types,
        )


def check_ranges(settings: Any, ranges: Mapping[str, tuple[float, float]] | None = None) -> None:
    """Check that the numbers in the settings are in their ranges.

    Args:
        settings: Instance of a dataclass.
        ranges: Field name -> (smallest, largest) allowed number. A number without an entry must
            be at least 0, and an integer at most 2**31 - 1.

    Raises:
        ValueError: A number is outside its range. The message names the field and the bound.
    """
    for name, value in vars(settings).items():
        if not isinstance(value, (int, float)):
            continue
        default = (0, math.inf if isinstance(value, float) else LARGEST_INT)
        smallest, largest = (ranges or {}).get(name, default)
        if value < smallest:
            raise ValueError(f"{name} must be at least {smallest}, not {value}")
        if value > largest:
            raise ValueError(f"{name} must be at most {largest}, not {value}")


def check_conflicts(
    settings: Any,
    excludes: Mapping[str, Collection[str]] | None = None,
    requires: Mapping[str, str] | None = None,
) -> None:
    """Check that no flag is given without effect. A field that is not its default counts as given.

    Args:
        settings: Instance of a dataclass.
        excludes: Field name -> fields that have no effect if the first one is given.
        requires: Field name -> the flag without which the field has no effect, such as `describe`
            or, with its value, `engine ray`.

    Raises:
        ValueError: A flag has no effect. The message names both flags.
    """
    fields = dataclasses.fields(settings)
    given = [field.name for field in fields if getattr(settings, field.name) != field.default]
    for name in given:
        for other in given:
            if other in (excludes or {}).get(name, ()):
                raise ValueError(f"--{other} has no effect beside --{name}: leave one out")
        required = (requires or {}).get(name, name)
        if required.split()[0] not in given:
            raise ValueError(f"--{name} has no effect without --{required}")


def near(name: str, names: Iterable[str]) -> str:
    """Return a suggestion for a misspelt name.

    Args:
        name: Unknown name.
        names: Names that exist.

    Returns:
        "; did you mean NAME?" with the most similar of the names, or "" if none is similar.
    """
    matches = difflib.get_close_matches(name, names, 1)
    return f"; did you mean {matches[0]}?" if matches else ""


def print_settings(settings: Any) -> None:
    """Print the settings in use, without the empty ones, on as few lines as they need."""
    parts = []
    for name, value in dataclasses.asdict(settings).items():
        if value not in (None, "", (), False):
            parts.append(f"{name}={setting_text(value)}")
    print(textwrap.fill(" ".join(parts), width=100))


def print_changes(old: Any, new: Any) -> None:
    """Print the settings that flags have changed on one line, or nothing if there are none.

    Args:
        old: The settings before.
        new: The settings after, of the same class.
    """
    old_values = dataclasses.asdict(old)
    changes = []
    for name, value in dataclasses.asdict(new).items():
        if value != old_values[name]:
            changes.append(f"{name} {setting_text(old_values[name])} -> {setting_text(value)}")
    if changes:
        print(f"changed by flags: {', '.join(changes)}")


def setting_text(value: Any) -> str:
    """Return the value of a setting as one writes it on the command line.

    Example: ("a", "b") -> "a b"; None and "" -> "unset".
    """
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, (tuple, list)):  # a list in a .json file is a tuple
        return " ".join(map(str, value))
    return "unset" if value in (None, "") else str(value)


@_number_types.primitive_rule
def _int_rule(info: tyro.constructors.PrimitiveTypeInfo):
    return _number_spec(int, "a whole number") if info.type is int else None


@_number_types.primitive_rule
def _float_rule(info: tyro.constructors.PrimitiveTypeInfo):
    return _number_spec(float, "a finite number") if info.type is float else None


def _number_spec(
    kind: Callable[[str], Number], description: str
) -> tyro.constructors.PrimitiveConstructorSpec[Number]:
    """Return the rule by which tyro parses an int or a float, with clear error messages."""

    def parse(texts: list[str]) -> Number:
        try:
            number = kind(texts[0])
            if math.isfinite(number):
                return number
        except (ValueError, OverflowError):
            pass
        raise ValueError(f"must be {description}, not {texts[0]!r}")

    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar=kind.__name__.upper(),
        instance_from_str=parse,
        is_instance=lambda value: isinstance(value, (int, float)),
        str_from_instance=lambda value: [str(value)],
    )


def _join_tuples(arguments: Sequence[str], tuple_flags: Collection[str]) -> list[str]:
    """Join the values of a tuple flag that is given twice.

    `--input a --input b` becomes `--input a b`. tyro would keep the last values only.
    """
    scalars: list[str] = []
    tuples: dict[str, list[str]] = {}
    target = scalars
    for argument in arguments:
        flag, equals_sign, value = argument.partition("=")
        if flag in tuple_flags:
            target = tuples.setdefault(flag, [])
            target += [value] if equals_sign else []
        elif argument.startswith("--"):
            target = scalars
            target.append(argument)
        else:
            target.append(argument)
    for flag, values in tuples.items():
        if not values:
            _usage_error(f"{flag} needs at least one value")
        scalars += [f"{flag}={values[0]}", *values[1:]]
    return scalars


def _reason(
    event: tyro._errors.ParseErrorEvent, flags: Sequence[str], other_names: Mapping[str, str]
) -> str:
    """Return the fault of the command line as one sentence."""
    if isinstance(event, tyro._errors.UnrecognizedArgs):
        token = event.tokens[0]
        if not token.startswith("-"):
            is_file = "--input" in flags and ("." in token or os.path.exists(token))
            suggestion = f"; did you mean --input {token}?" if is_file else ""
            return f"unexpected value {token!r}{suggestion}"
        flag = token.split("=")[0]
        name = other_names.get(flag.lstrip("-").replace("-", "_"))
        suggestion = f"; did you mean --{name}?" if name else near(flag, flags)
        return f"unknown {token}{suggestion}"
    flag = event.argument.lowered.name_or_flags[0]  # type: ignore[attr-defined]
    if isinstance(event, tyro._errors.BadValue):
        return f"{flag} needs a value; write {flag}=VALUE if the value begins with a dash"
    if isinstance(event, tyro._errors.InvalidChoice):
        choices = ", ".join(choice or '""' for choice in event.choices)
        suggestion = near(event.value, event.choices)
        return f"{flag} must be one of {choices}, not {event.value!r}{suggestion}"
    number = re.search(r"must be a (whole|finite) number, not .*", event.message)  # type: ignore[attr-defined]
    return f"{flag} {number[0] if number else 'has a value of the wrong type'}"


def _usage_error(reason: str) -> NoReturn:
    """Print a usage error and end the program with exit code 2."""
    script = sys.argv[0]
    print(f"error: {reason} (python {script} --help lists the flags)", file=sys.stderr)
    sys.exit(2)
