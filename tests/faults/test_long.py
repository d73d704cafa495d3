"""What grows in a long run: nothing. bench/faults.py runs 50,000 steps and 5 GB."""

import gc
import json

import pytest
from matplotlib.figure import Figure

from bench import faults
from corpus import pipeline
from training.metrics import plot_losses


def test_a_plot_leaves_nothing_in_memory(tmp_path):
    """It was a megabyte per validation; the last figure stays until the next one."""
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1, "val_loss": 1.0}) + "\n")
    for _ in range(3):
        plot_losses(tmp_path)
    assert len([thing for thing in gc.get_objects() if type(thing) is Figure]) <= 1


@pytest.mark.slow
def test_the_counts(memory_folder, monkeypatch):
    """bench/faults.py at toy size."""
    monkeypatch.chdir(memory_folder)
    monkeypatch.setattr(pipeline, "TASK_BYTES", pipeline.TASK_BYTES)  # it changes them
    settings = faults.Settings(kills=1, training_kills=1, gigabytes=0.005)
    faults.make_training_corpus()
    rows = {description: counts for description, *counts in faults.kill_runs(settings)}
    for description in ("preparing: all processes", "training"):
        # it may end just before the kill, so whether it succeeded is not compared
        num_kills, _, incomplete, finished, identical, left_over = rows[description]
        counts = (num_kills, incomplete, finished, identical, left_over)
        assert counts == (1, 0, 1, 1, 0), description
    description, _, *numbers = next(faults.long_runs(settings))
    assert description == "preparing 0.005 GB" and len(numbers) == 6 and max(numbers) > 0
