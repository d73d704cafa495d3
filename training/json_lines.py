"""Files of one JSON object per line, each with a step of the run: metrics.jsonl, samples.jsonl."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class JsonLines:
    """Adds lines to a file of JSON objects.

    Lines after `step`, which a killed run leaves, are dropped.

    Args:
        path: File; created if it does not exist.
        step: Optimizer steps done.

    Raises:
        ValueError: A line of the file is damaged.
        OSError: The file cannot be written.
    """

    def __init__(self, path: Path, step: int):
        self.path = path
        self.file = open(path, "a", buffering=1)  # a line at a time
        size = sum(num_bytes for num_bytes, line in _lines(path) if line["step"] <= step)
        self.file.truncate(size)

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Add a line.

        Args:
            step: Optimizer steps done.
            values: The other values of the line.

        Raises:
            OSError: The file cannot be written.
        """
        try:
            self.file.write(json.dumps({"step": step, **values}) + "\n")
        except OSError as error:
            error.filename = str(self.path)  # a failed write does not set it
            with contextlib.suppress(OSError):
                self.file.close()  # which writes again; a later close() does not
            raise

    def close(self) -> None:
        """Close the file."""
        self.file.close()


def read_lines(path: Path) -> list[dict]:
    """Return the lines of a file, without a last line that a kill has cut short.

    Args:
        path: metrics.jsonl or samples.jsonl of a run. A missing file has no lines.

    Raises:
        ValueError: A line is damaged.
    """
    return [line for _, line in _lines(path)] if path.exists() else []


def _lines(path: Path) -> Iterator[tuple[int, dict]]:
    """Yield the number of bytes and the values of each whole line."""
    with open(path, "rb") as f:
        for line_number, line in enumerate(f, 1):
            if not line.endswith(b"\n"):
                return
            try:
                values = json.loads(line)
                yield len(line), values | {"step": int(values["step"])}
            except (ValueError, TypeError, KeyError):
                raise ValueError(
                    f"{path}, line {line_number} is damaged: remove that line"
                ) from None
