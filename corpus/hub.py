"""Data sets of the `datasets` library, on the Hugging Face hub or in a local folder."""

import logging
from pathlib import Path

from common.packages import optional
from corpus.sources import Source

SPLITS = {"train": "train", "validation": "val", "valid": "val", "val": "val", "test": "test"}


def hugging_face(name: str, text_field: str, config: str | None = None) -> list[Source]:
    """Return the Arrow files that the `datasets` library makes of a data set.

    The splits train, validation and test of the data set become train, val and test. Without a
    validation split, train is divided into train and val.

    Args:
        name: NAME or NAME/CONFIG on the hub, or the path of a folder.
        text_field: Column that holds the text; "" for "text".
        config: Name of the config; None if the end of `name` may be the name of a config.

    Raises:
        ValueError: The data set cannot be loaded, or has no rows, or the package `datasets` is
            missing.
    """
    datasets = optional("datasets", f"--input hf:{name}")
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # no line for each attempt
    splits = _load(datasets, name, config)
    official = {"train", "val"} <= {SPLITS.get(split) for split in splits}
    sources = []
    for split, data in splits.items():
        target = _target(split, official) if len(splits) > 1 else ""
        for cache_file in data.cache_files:
            path = cache_file["filename"]
            sources.append(Source(path, "arrow", field=text_field or "text", split=target))
    if not sources:
        raise ValueError(f"--input hf:{name}: the data set has no rows")
    return sources


def _target(split: str, official: bool) -> str:
    """Return train, val or test for a split of a data set; "" to divide it into train and val.

    Args:
        split: Name of the split in the data set.
        official: Whether the data set has both a training and a validation split.
    """
    if official:
        return SPLITS.get(split, "train")
    return "test" if split == "test" else ""  # text for tests is never trained on


def _load(datasets, name, config):
    """Return the splits of a data set by name; `name` may end with the name of a config."""
    folder, _, last = name.rpartition("/")
    attempts = [(name, config)]
    if config is None and folder and not Path(name).exists():
        attempts.append((folder, last))
    if Path(folder or name).exists() or name.count("/") == 2:
        attempts.reverse()  # FOLDER/CONFIG or ORGANISATION/NAME/CONFIG is more likely
    reasons = []
    for path, path_config in attempts:
        try:
            return datasets.load_dataset(path, path_config)
        except (ValueError, OSError, datasets.exceptions.DatasetsError) as error:
            hint = "; is there a network?" if isinstance(error, ConnectionError) else ""
            reasons.append(" ".join(str(error.__cause__ or error).split()) + hint)
    raise ValueError(f"--input hf:{name}: {reasons[0]}")
