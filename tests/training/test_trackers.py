"""--tracker: TensorBoard, trackio and wandb get the numbers of metrics.jsonl, also on a resume."""

import json
import struct
import sys
import time
import types

import pytest
from conftest import losses

NAMES = ("train_loss", "learning_rate", "val_loss", "val_bpb")


def train_in_parts(train, tracker):
    """Train to step 5, continue from step 3, as after a kill, and return the folder of the run."""
    folder = train(max_steps=8, eval_every=3, stop_at=5, tracker=tracker, run_name="mine")
    (folder / "previous.pt").replace(folder / "last.pt")
    train(resume=folder)
    assert list(losses(folder)) == list(range(1, 9))
    return folder


def test_tensorboard_has_the_same_numbers(train):
    event_accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="needs tensorboard"
    )
    folder = train_in_parts(train, "tensorboard")
    events = event_accumulator.EventAccumulator(str(folder / "tensorboard")).Reload()
    for name in NAMES:
        found = {event.step: event.value for event in events.Scalars(name)}
        assert found == pytest.approx(losses(folder, name), rel=1e-6)


def test_trackio_has_the_same_numbers_once(train, tmp_path, monkeypatch):
    pytest.importorskip("trackio", reason="needs trackio")
    from trackio import utils
    from trackio.sqlite_storage import SQLiteStorage

    for module in list(sys.modules):
        if module.startswith("trackio") and hasattr(sys.modules[module], "TRACKIO_DIR"):
            monkeypatch.setattr(sys.modules[module], "TRACKIO_DIR", tmp_path / "trackio")
    assert tmp_path / "trackio" == utils.TRACKIO_DIR
    folder = train_in_parts(train, "trackio")
    (run,) = SQLiteStorage.get_run_records("train_gpt2")
    rows = SQLiteStorage.get_logs("train_gpt2", "mine", run_id=run["id"])
    for name in NAMES:
        found = [(row["step"], row[name]) for row in rows if name in row]
        assert found == list(losses(folder, name).items())


def test_wandb_offline_has_the_same_numbers_in_one_run(train, tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="needs wandb")
    for name in ("HOME", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    folder = train_in_parts(train, "wandb")
    files = sorted(folder.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.parent.name)
    assert len(files) == 2 and len({path.name for path in files}) == 1  # run-ID.wandb
    rows = []
    deadline = time.monotonic() + 60
    while not any(row["_step"] == 8 and "val_loss" in row for row in rows):
        assert time.monotonic() < deadline, rows  # wandb writes a little after its finish()
        rows = [row for path in files for row in wandb_history(path)]
        time.sleep(0.1)
    for name in NAMES:  # `wandb sync` sends steps 4 and 5 twice, with the same values on a CPU
        found = {row["_step"]: row[name] for row in rows if name in row}
        assert found == losses(folder, name)


def wandb_history(path):
    """Yield the values that a file of an offline run holds, in the format of LevelDB's logs."""
    from wandb.proto.wandb_internal_pb2 import Record

    data = path.read_bytes()
    position = 7  # after the header of the file
    content = b""
    while position + 7 <= len(data):
        if 32768 - position % 32768 < 7:  # no room for a record in this block
            position += 32768 - position % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        if position + 7 + length > len(data):  # it is being written
            return
        content += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            items = Record.FromString(content).history.item
            content = b""
            if items:
                yield {
                    (item.key or item.nested_key[0]): json.loads(item.value_json) for item in items
                }


@pytest.mark.parametrize("tracker", ["trackio", "wandb"])
def test_a_missing_package_is_named_and_leaves_no_folder(train, tmp_path, monkeypatch, tracker):
    monkeypatch.setitem(sys.modules, tracker, None)
    with pytest.raises(ValueError, match=f"--tracker {tracker} needs a package: pip install"):
        train(max_steps=1, tracker=tracker, run_name="mine")
    assert not list(tmp_path.glob("out/mine"))  # an empty folder is not a run


def test_wandb_without_a_login_is_one_sentence(train, monkeypatch):
    def init(**settings):
        raise RuntimeError("No API key configured.")

    fake = types.SimpleNamespace(Error=RuntimeError, init=init)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    with pytest.raises(ValueError, match="wandb: No API key configured; log in with"):
        train(max_steps=1, tracker="wandb")


def test_an_unknown_tracker_is_refused(train, capsys):
    with pytest.raises(SystemExit):
        train(max_steps=1, tracker="mlflow")
    assert "--tracker must be one of" in capsys.readouterr().err
