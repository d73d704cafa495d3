"""Behind prepare_data.py: raw text to token files."""
