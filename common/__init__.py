"""What all packages share. Nothing here imports another package of the project.

In the order of reading:

1. settings.py: a dataclass of settings is also the flags of a script.
2. script.py: exit codes, and errors as one line.
3. files.py: files that are written completely or not at all, JSON, locks.
4. packages.py: packages that only some features need.
5. malloc.py: settings of malloc.
6. grouping.py: items in groups of a limited size.
7. hashing.py: a hash of integers that is the same on every machine.
"""
