"""Shared by all packages: settings.py, script.py, files.py, packages.py, hashing.py."""
