"""Behind train_gpt2.py and sample.py."""
