"""The folders of runs, out/RUN/: made, found, locked, described by config.json."""

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterator
from pathlib import Path

from common.files import atomic_write, exclusive_lock, folder_name
from training.compute import ComputeChoices
from training.corpora import corpus_name
from training.distributed import Ranks
from training.run_settings import RunSettings


class RunLock(contextlib.ExitStack):
    """Keeps other processes from training a run, until the block or the process ends.

    Rank 0 holds the lock for all ranks of the run.

    Args:
        ranks: This process among all.
    """

    def __init__(self, ranks: Ranks):
        super().__init__()
        self.ranks = ranks
        self.run_dir: Path | None = None

    def take(self, run_dir: Path) -> None:
        """Lock a run; every rank calls this method. A lock that is held already stays.

        Args:
            run_dir: Folder of the run, which exists.

        Raises:
            BlockingIOError: Another process trains the run.
            OSError: The lock file cannot be written.
        """
        if self.run_dir == run_dir:
            return
        message = (
            f"{run_dir} is being trained by another process: wait for it, or choose another "
            f"--run_name"
        )
        lock = exclusive_lock(run_dir / ".lock", message)

        def lock_folder() -> None:
            self.enter_context(_removed_if_empty(run_dir))
            self.enter_context(lock)

        self.ranks.on_first(lock_folder)
        self.run_dir = run_dir


@contextlib.contextmanager
def _removed_if_empty(folder: Path) -> Iterator[None]:
    """Remove a folder at the end of the block if the block left it empty, as after an error."""
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # it has files
            folder.rmdir()


def run_folder(settings: RunSettings, ranks: Ranks) -> Path:
    """Return the folder of the run to resume, or make the folder of a new run.

    Args:
        settings: From resolve_size.
        ranks: This process among all; rank 0 makes the folder.

    Raises:
        FileExistsError: The folder holds another run.
        OSError: The folder cannot be made.
    """
    if settings.resume not in ("", "auto"):
        return Path(settings.resume)
    return ranks.on_first(lambda: new_run(settings))


def is_run(path: Path) -> bool:
    """Return whether a path names a run, by its folder or by one of its checkpoints."""
    if path.is_file():
        return path.suffix == ".pt"
    return any((path / name).exists() for name in ("last.pt", "previous.pt", "best.pt"))


def run_of(path: Path) -> Path:
    """Return the folder of the run that a user names by the folder or by a file in it.

    Example: out/mine/last.pt -> out/mine.
    """
    is_file = path.is_file() or (path.suffix == ".pt" and not path.is_dir())
    return path.parent if is_file else path


def write_config(
    run_dir: Path,
    settings: RunSettings,
    compute: ComputeChoices,
    num_parameters: int,
    val_text: dict | None,
) -> None:
    """Write config.json: the settings asked for and, under "chosen", the choices for this machine.

    For compare.py, it also has "parameters" and, if known, "val_text". Files that a killed run left
    half-written are removed.

    Args:
        run_dir: Folder of the run.
        settings: After resolve_steps.
        compute: From choose_compute.
        num_parameters: Number of parameters of the model.
        val_text: From describe_val_text: which text the validation losses are of.

    Raises:
        OSError: The folder cannot be written.
    """
    for leftover in run_dir.glob("*.tmp"):
        leftover.unlink()
    config = dataclasses.asdict(settings)
    config |= {"chosen": compute.plain_values(), "parameters": num_parameters}
    if val_text:
        config["val_text"] = val_text
    with atomic_write(run_dir / "config.json") as f:
        f.write(json.dumps(config, indent=2).encode())


def new_run(settings: RunSettings) -> Path:
    """Make the folder of a new run: OUT_DIR/RUN_NAME, or OUT_DIR/CORPUS-SIZE-1, -2, ...

    A named folder in which no checkpoint was ever saved is used again.

    Raises:
        FileExistsError: The named folder holds a run.
    """
    out_dir = Path(settings.out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    if settings.run_name:
        run_dir = out_dir / folder_name(settings.run_name, "--run_name")
        if any(run_dir.glob("*.pt")):
            raise FileExistsError(
                f"{run_dir} holds a run already: continue it with --resume {run_dir}, or choose "
                f"another --run_name"
            )
        run_dir.mkdir(exist_ok=True)
        return run_dir
    number = 1
    while True:
        run_dir = out_dir / f"{corpus_name(settings)}-{settings.size}-{number}"
        try:  # not `if it exists`: two runs may start at once
            run_dir.mkdir()
            return run_dir
        except FileExistsError:
            number += 1


def saved_runs(out_dir: str | Path) -> list[Path]:
    """Return the folders under `out_dir` that have a last.pt, the one saved last first."""
    checkpoints = sorted(Path(out_dir).glob("*/last.pt"), key=os.path.getmtime, reverse=True)
    return [path.parent for path in checkpoints]


def newest_run(out_dir: str | Path) -> Path:
    """Return the folder under `out_dir` whose last.pt was saved last.

    Raises:
        FileNotFoundError: No run has a checkpoint.
    """
    runs = saved_runs(out_dir)
    if not runs:
        raise FileNotFoundError(f"{out_dir}/ has no trained model: run python train_gpt2.py first")
    return runs[0]


def no_run_message(run: Path, out_dir: str | Path) -> str:
    """Return the message for a path that names no run with a checkpoint.

    The message lists the newest runs in the folder itself or beside it, else those of `out_dir`.

    Args:
        run: The path.
        out_dir: Folder of runs.
    """
    for folder in (run, run.parent, Path(out_dir)):
        names = [str(path) for path in saved_runs(folder)[:3]]
        if names:
            return f"{run} is not a run with a checkpoint: name one, such as {', '.join(names)}"
    return f"{run} is not a run with a checkpoint: train one with python train_gpt2.py"
