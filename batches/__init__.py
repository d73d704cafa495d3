"""Behind dataset.py: token files to batches."""
