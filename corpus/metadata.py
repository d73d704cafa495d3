"""metadata.json of a prepared corpus (data/README.md says what it holds)."""

import hashlib
import json
import os
from pathlib import Path

from common.files import folder_name, read_json
from common.settings import near


def read_metadata(corpus_dir) -> dict:
    """metadata.json of a prepared corpus (data/README.md says what it holds).

    Raises FileNotFoundError, or ValueError for one that is damaged, with the remedy.
    """
    path = Path(corpus_dir) / "metadata.json"
    try:
        metadata = read_json(path)
        sound = _sound(metadata)
    except FileNotFoundError:
        prepared = sorted(path.parent.parent.glob("*/metadata.json"))
        there = [other.parent.name for other in prepared]
        raise FileNotFoundError(
            f"{path.parent} is no prepared corpus: run python prepare_data.py, or choose "
            f"another (there: {', '.join(there) or 'none'}){near(path.parent.name, there)}"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        sound = False
    if not sound:
        raise ValueError(
            f"{path} is damaged, or of another version: run python prepare_data.py again, with the "
            f"flags it was made with"
        )
    return metadata


def _sound(metadata) -> bool:
    """Whether it is what prepare_data.py writes; it may be damaged, or a stranger's."""
    splits, tokenizer = list(metadata["splits"].values()), metadata["tokenizer"]
    files = [file for split in splits for file in split["files"]]
    for name in (tokenizer["name"], *(file["name"] for file in files)):
        folder_name(name, "")  # or it would lead out of its folder
    vocab_size, eot = metadata["vocab_size"], metadata.get("eot_token", 0)
    sizes = [vocab_size, *(split[name] for split in splits for name in ("tokens", "bytes"))]
    counts = [eot, *(metadata.get(name, 0) for name in ("seed", "max_length"))]
    counts += [file["tokens"] for file in files] + [split.get("documents", 0) for split in splits]
    return (
        metadata["format_version"] == 1
        and metadata["dtype"] in ("uint16", "uint32")
        and type(tokenizer["sha256"]) is str
        and type(metadata.get("eot_per_document", True)) is bool
        and all(split["files"] for split in splits)
        and all(type(n) is int and n >= 0 for n in sizes + counts)
        and min(sizes) > 0
        and eot < vocab_size
        and metadata.get("sha256") in (None, sealed(metadata)["sha256"])
    )


def sealed(metadata: dict) -> dict:
    """metadata, and last the sha256 of all its other fields, by which damage is found."""
    rest = {name: value for name, value in metadata.items() if name != "sha256"}
    return rest | {"sha256": hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()}


def newest_corpus(data_dir) -> Path:
    """The folder under `data_dir` that was prepared last."""
    prepared = sorted(Path(data_dir).glob("*/metadata.json"), key=os.path.getmtime)
    if not prepared:
        raise FileNotFoundError(
            f"{Path(data_dir).resolve()} has no prepared corpus: run python prepare_data.py, or "
            f"name its folder by --data_dir"
        )
    return prepared[-1].parent
