"""What grows in a long run: nothing. bench/faults.py runs 50,000 steps and 5 GB."""

import gc
import json
import subprocess
import sys

from conftest import ROOT
from matplotlib.figure import Figure

from metrics import plot_losses


def test_a_plot_leaves_nothing_in_memory(tmp_path):
    """A megabyte a validation, it was; the last is there until the next."""
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1, "val_loss": 1.0}) + "\n")
    for _ in range(3):
        plot_losses(tmp_path)
    assert len([thing for thing in gc.get_objects() if type(thing) is Figure]) <= 1


def test_the_counts(in_memory):
    """bench/faults.py at toy size."""
    flags = ["--kills", "1", "--training_kills", "1", "--steps", "20", "--gigabytes", "0.01"]
    flags += ["--results", in_memory / "RESULTS.md", "--folder", in_memory]
    result = subprocess.run(
        [sys.executable, "-m", "bench.faults", *flags], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    text = (in_memory / "RESULTS.md").read_text()
    assert "| preparing: all processes | 1 | 0 | 0 | 1 | 1 | 0 |" in text
    assert "| training | 1 | 0 | 0 | 1 | 1 | 0 |" in text
    assert "| preparing 0.01 GB |" in text and "| training for 20 steps |" in text
