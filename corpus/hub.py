"""Data sets of the `datasets` library, on the Hugging Face hub or in a local folder."""

import logging
import os
from pathlib import Path

from common.packages import optional
from corpus.sources import Source
from corpus.split_names import Report, keep_named_splits, report_nothing, split_of_name


def hugging_face(
    name: str,
    text_field: str,
    config: str | None = None,
    split_names: str = "keep",
    report: Report = print,
) -> list[Source]:
    """Return the Arrow files that the `datasets` library makes of a data set.

    The splits become train, val and test by their names (split_names.py). Beside a split for train,
    splits with other names are left out. Without a split for val, train is divided into train and
    val.

    Args:
        name: NAME or NAME/CONFIG on the hub, or the path of a folder, which may be one that
            save_to_disk wrote.
        text_field: Column that holds the text; "" for "text".
        config: Name of the config; None if the end of `name` may be the name of a config.
        split_names: "keep", or "ignore": divide all splits into train and val.
        report: Function that takes the lines about the splits.

    Raises:
        ValueError: The data set cannot be loaded, has no rows, or has nothing for train, or the
            package `datasets` is missing.
    """
    item = f"hf:{name}"
    if not name.strip():
        raise ValueError("--input hf: has no name: write hf:NAME, hf:NAME/CONFIG or hf:FOLDER")
    datasets = optional("datasets", f"--input {item}")
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # no line for each attempt
    splits = _load(datasets, name, config)
    targets = {split: split_of_name(split) for split in splits}
    if split_names == "ignore":
        targets = dict.fromkeys(splits, "")
    others = [split for split, target in targets.items() if not target]
    if others and "train" in targets.values():
        report(
            f"left out of {item}: splits with names of neither train, val nor test "
            f"({', '.join(others)}); --split_names ignore divides all splits into train and val"
        )
        targets = {split: target for split, target in targets.items() if target}
    elif len(others) == len(splits) > 1:
        report(f"{item}: all splits are divided into train and val ({', '.join(others)})")
    sources = []
    for split, target in targets.items():
        data = splits[split]
        # one file, or several if the data set is large
        for i, cache_file in enumerate(data.cache_files):
            path = cache_file["filename"]
            file_name = f"{data.config_name or 'default'}/{split}" + (f"/{i}" if i else "")
            sources.append(
                Source(path, "arrow", field=text_field or "text", split=target, name=file_name)
            )
    if not sources:
        raise ValueError(f"--input {item}: the data set has no rows")
    if len(targets) == 1:  # there is nothing to say about splits
        report = report_nothing
    return keep_named_splits(sources, report, item)


def _load(datasets, name: str, config: str | None) -> dict:
    """Return the splits of a data set by name; `name` may end with the name of a config."""
    if config is None and _is_saved(Path(name)):
        return _load_saved(datasets, name)
    folder, _, last = name.rpartition("/")
    attempts = [(name, config)]
    if config is None and folder and not os.path.exists(name):
        attempts.append((folder, last))
    if os.path.exists(folder or name) or name.count("/") == 2:
        attempts.reverse()  # FOLDER/CONFIG or ORGANISATION/NAME/CONFIG is more likely
    reasons = []
    for path, path_config in attempts:
        try:
            # in memory, as HF_DATASETS_IN_MEMORY_MAX_SIZE may ask, a data set has no files
            return datasets.load_dataset(path, path_config, keep_in_memory=False)
        except Exception as error:  # of the library, of a reader, or of the folder's README.md
            reasons.append(_reason(error, path))
    raise ValueError(f"--input hf:{name}: {reasons[0]}")


def _reason(error: Exception, path: str) -> str:
    """Return the reason of an error of the library on one line, with a remedy."""
    reason = " ".join(str(error.__cause__ or error).split()) or type(error).__name__
    if isinstance(error, ConnectionError):
        return f"{reason}; is there a network?"
    if "script" in reason.lower():
        return (
            f"{reason}; name the data files themselves: --input FOLDER or --input 'FOLDER/*.jsonl'"
        )
    if type(error).__module__.startswith("yaml"):
        return f"{Path(path) / 'README.md'} is damaged: mend it or remove it ({reason})"
    return reason


def _is_saved(folder: Path) -> bool:
    """Return whether Dataset.save_to_disk or DatasetDict.save_to_disk wrote a folder."""
    is_dataset = (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()
    return is_dataset or (folder / "dataset_dict.json").is_file()


def _load_saved(datasets, folder: str) -> dict:
    """Return the splits of a folder that save_to_disk wrote, by name.

    Raises:
        ValueError: The folder is damaged.
    """
    try:
        data = datasets.load_from_disk(folder, keep_in_memory=False)
    except Exception as error:  # whatever a damaged file makes the library raise
        raise ValueError(f"--input hf:{folder}: {_reason(error, folder)}") from None
    return data if isinstance(data, dict) else {str(data.split or ""): data}
