"""The folders of runs, out/RUN/: made, found, described by config.json."""

import dataclasses
import json
import os
from pathlib import Path

from common.files import atomic_write, folder_name


def run_folder(settings) -> Path:
    """Return the folder of the run to resume, or make that of a new run.

    Raises:
        FileExistsError: The folder holds another run.
        OSError: It cannot be made.
    """
    resumed = settings.resume not in ("", "auto")
    return Path(settings.resume) if resumed else new_run(settings)


def write_config(folder: Path, settings, compute) -> None:
    """Write config.json: the settings asked for, and under "chosen" what this machine takes.

    Files that a killed run left half-written are removed.

    Raises:
        OSError: The folder cannot be written.
    """
    for leftover in folder.glob("*.tmp"):
        leftover.unlink()
    config = dataclasses.asdict(settings) | {"chosen": compute.saved()}
    with atomic_write(folder / "config.json") as f:
        f.write(json.dumps(config, indent=2).encode())


def new_run(settings) -> Path:
    """Make the folder of a new run: OUT_DIR/RUN_NAME, or OUT_DIR/CORPUS-SIZE-1, -2, ...

    A named folder in which no checkpoint was ever saved is used again.

    Raises:
        FileExistsError: The named folder holds a run.
    """
    out_dir = Path(settings.out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    if settings.run_name:
        folder = out_dir / folder_name(settings.run_name, "--run_name")
        if any(folder.glob("*.pt")):
            raise FileExistsError(
                f"{folder} holds a run already: continue it with --resume {folder}, or choose "
                f"another --run_name"
            )
        folder.mkdir(exist_ok=True)
        return folder
    number = 1
    while True:
        folder = out_dir / f"{settings.corpus}-{settings.size}-{number}"
        try:  # not looked up first: two runs may start at once
            folder.mkdir()
            return folder
        except FileExistsError:
            number += 1


def newest_run(out_dir) -> Path:
    """Return the folder under `out_dir` whose last.pt was saved last.

    Raises:
        FileNotFoundError: There is none.
    """
    checkpoints = sorted(Path(out_dir).glob("*/last.pt"), key=os.path.getmtime)
    if not checkpoints:
        raise FileNotFoundError(f"{out_dir}/ has no trained model: run python train_gpt2.py first")
    return checkpoints[-1].parent
