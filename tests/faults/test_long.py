"""Memory and open files do not grow in a long run.

bench/faults.py tests 50,000 steps and 5 GB of text.
"""

import gc
import json

import pytest
from matplotlib.figure import Figure

from bench import faults
from corpus import pipeline
from training.metrics import plot_losses


def test_a_plot_leaves_nothing_in_memory(tmp_path):
    """At most the last figure stays until the next plot."""
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1, "val_loss": 1.0}) + "\n")
    for _ in range(3):
        plot_losses(tmp_path)
    figures = [item for item in gc.get_objects() if type(item) is Figure]
    assert len(figures) <= 1


@pytest.mark.slow
def test_bench_faults_at_toy_size_reports_no_loss(memory_folder, monkeypatch):
    monkeypatch.chdir(memory_folder)
    monkeypatch.setattr(pipeline, "TASK_BYTES", pipeline.TASK_BYTES)  # restored at the end
    settings = faults.Settings(kills=1, training_kills=1, gigabytes=0.005)
    faults.make_training_corpus()
    rows = {description: counts for description, *counts in faults.kill_runs(settings)}
    for description in ("preparing: all processes", "training"):
        # the process may end just before the kill, so the test does not check the second count
        num_kills, _, incomplete, finished, identical, left_over = rows[description]
        counts = (num_kills, incomplete, finished, identical, left_over)
        assert counts == (1, 0, 1, 1, 0), description
    description, _, *numbers = next(faults.long_runs(settings))
    assert description == "preparing 0.005 GB"
    assert len(numbers) == 6
    assert max(numbers) > 0
