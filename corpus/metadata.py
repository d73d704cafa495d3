"""metadata.json of a prepared corpus: reading, checks, checksum and fingerprint.

data/README.md lists the fields.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from common.files import folder_name, read_json
from common.settings import near

FINGERPRINTED = (  # and split_rule, if there is one
    "corpus", "source", "tokenizer", "vocab_size", "eot_token", "eot_per_document", "dtype",
    "train_split_ratio", "seed", "max_length",
)  # fmt: skip


def read_metadata(corpus_dir: str | Path) -> dict:
    """Return the metadata of a prepared corpus.

    Args:
        corpus_dir: Folder of the corpus, data/NAME.

    Returns:
        The content of metadata.json.

    Raises:
        FileNotFoundError: The folder is not a prepared corpus. The message names the prepared ones.
        ValueError: metadata.json is damaged, or of another version.
    """
    path = Path(corpus_dir) / "metadata.json"
    try:
        metadata = read_json(path)
        valid = _is_valid(metadata)
    except FileNotFoundError:
        prepared = sorted(path.parent.parent.glob("*/metadata.json"))
        names = [other.parent.name for other in prepared]
        raise FileNotFoundError(
            f"{path.parent} is not a prepared corpus: run python prepare_data.py, or choose "
            f"another (prepared: {', '.join(names) or 'none'}){near(path.parent.name, names)}"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        valid = False
    if not valid:
        raise ValueError(
            f"{path} is damaged, or of another version: run python prepare_data.py again, with the "
            f"flags it was made with"
        )
    return metadata


def _is_valid(metadata: Any) -> bool:
    """Return whether the metadata are as prepare_data.py writes them.

    For other values this may also raise KeyError, TypeError, AttributeError or ValueError.
    """
    tokenizer = metadata["tokenizer"]
    splits = list(metadata["splits"].values())
    files = [file for split in splits for file in split["files"]]
    for name in (tokenizer["name"], *(file["name"] for file in files)):
        folder_name(name, "")  # raises ValueError for a name that leads out of the folder
    vocab_size = metadata["vocab_size"]
    eot_token = metadata.get("eot_token", 0)
    positive = [vocab_size, *(split[name] for split in splits for name in ("tokens", "bytes"))]
    counts = [eot_token, *(metadata.get(name, 0) for name in ("seed", "max_length"))]
    counts += [file["tokens"] for file in files]
    counts += [split.get("documents", 0) for split in splits]
    return (
        metadata["format_version"] == 1
        and metadata["dtype"] in ("uint16", "uint32")
        and type(tokenizer["sha256"]) is str
        and type(metadata.get("eot_per_document", True)) is bool
        and all(split["files"] for split in splits)
        and all(type(n) is int and n >= 0 for n in positive + counts)
        and min(positive) > 0
        and eot_token < vocab_size
        and metadata.get("sha256") in (None, with_checksum(metadata)["sha256"])
    )


def require_end_of_text(metadata: dict, corpus_dir: str | Path) -> None:
    """Check that the metadata have the fields about the end-of-text token.

    Args:
        metadata: Metadata of a prepared corpus.
        corpus_dir: Folder of the corpus, data/NAME, for the error message.

    Raises:
        ValueError: A field is missing.
    """
    for name in ("eot_token", "eot_per_document"):
        if name not in metadata:
            raise ValueError(
                f"{Path(corpus_dir) / 'metadata.json'} has no {name}: run python prepare_data.py "
                f"again, with the flags it was made with"
            )


def with_checksum(metadata: dict) -> dict:
    """Return the metadata with a last field "sha256", the hash of all other fields."""
    fields = {name: value for name, value in metadata.items() if name != "sha256"}
    digest = hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
    return fields | {"sha256": digest}


def fingerprint(metadata: dict, corpus_dir: Path) -> str:
    """Return one hash of the present state of everything that a prepared corpus depends on.

    The hash covers the sources (relative path, size, time of the last change in nanoseconds, and
    how they are read), the tokenizer and the settings. A corpus is up to date if its metadata.json
    has this fingerprint.

    Args:
        metadata: Metadata with at least the fields of FINGERPRINTED.
        corpus_dir: Folder of the corpus, data/NAME, to which the paths of the sources are relative.

    Returns:
        A sha256, in hexadecimal.

    Raises:
        OSError: A source is missing.
    """
    fields = {name: metadata[name] for name in FINGERPRINTED}
    if "split_rule" in metadata:
        fields["split_rule"] = metadata["split_rule"]
    states = []
    for file in metadata["source"]["files"]:
        state = os.stat(source_path(corpus_dir, file))
        states.append([state.st_size, state.st_mtime_ns])
    return hashlib.sha256(json.dumps([fields, states], sort_keys=True).encode()).hexdigest()


def by_first_split_rule(metadata: dict) -> dict:
    """Return the metadata as the version before "split_rule" would write them.

    Args:
        metadata: Metadata with at least the fields of FINGERPRINTED.

    Returns:
        Metadata without "split_rule" and without the names of the sources.
    """
    old = {name: value for name, value in metadata.items() if name != "split_rule"}
    files = [
        {name: value for name, value in file.items() if name != "name"}
        for file in metadata["source"]["files"]
    ]
    return old | {"source": metadata["source"] | {"files": files}}


def source_path(corpus_dir: Path, file: dict) -> Path:
    """Return the path of a source file.

    Args:
        corpus_dir: Folder of the corpus, data/NAME. The folder need not exist yet.
        file: Entry of the file in metadata.json, with a path relative to the folder.

    Returns:
        An absolute path.
    """
    return Path(os.path.normpath(corpus_dir.absolute() / file["path"]))


def newest_corpus(data_dir: str | Path) -> Path:
    """Return the corpus that was prepared last.

    Args:
        data_dir: Folder of prepared corpora.

    Returns:
        Folder of the corpus, DATA_DIR/NAME.

    Raises:
        FileNotFoundError: `data_dir` has no prepared corpus.
    """
    prepared = sorted(Path(data_dir).glob("*/metadata.json"), key=os.path.getmtime)
    if not prepared:
        raise FileNotFoundError(
            f"{Path(data_dir).resolve()} has no prepared corpus: run python prepare_data.py, or "
            f"name its folder with --data_dir"
        )
    return prepared[-1].parent
