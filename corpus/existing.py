"""What data/NAME/ holds before it is prepared: the same corpus, or files to leave alone.

- `up_to_date`: the corpus was prepared from the same files in the same way. Nothing is left to do.
- `refuse_other_files`: the corpus was made of other files, or by another program. An error.
- `has_unpublished_shards`: an earlier process was killed while it replaced an older corpus.
"""

import contextlib
import os
from pathlib import Path

from common.files import read_json
from corpus.metadata import by_first_split_rule, fingerprint, read_metadata, source_path
from corpus.shards import SHARD_NAME
from corpus.token_files import open_tokens


def up_to_date(corpus_dir: Path, initial_metadata: dict, quiet: bool = False) -> dict | None:
    """Return the metadata of the prepared corpus if it has the wanted fingerprint, else None.

    A corpus of an older version, which split by another rule, counts as up to date: runs that were
    trained on it can only be resumed with its splits.

    Args:
        corpus_dir: Folder of the corpus, data/NAME.
        initial_metadata: Metadata of the present sources and settings, with their fingerprint.
        quiet: Whether to print nothing and to keep the date of metadata.json.

    Returns:
        The metadata, or None if the corpus is missing, damaged or out of date.
    """
    path = corpus_dir / "metadata.json"
    try:
        metadata = read_metadata(corpus_dir)
        found = metadata.get("fingerprint")
        if found != initial_metadata["fingerprint"]:
            older = by_first_split_rule(initial_metadata)
            if found != fingerprint(older, corpus_dir):
                return None
        for split in metadata["splits"]:
            open_tokens(corpus_dir / split)  # checks that each file is there, at its full length
    except (OSError, ValueError):  # metadata.json or a shard is missing or damaged
        return None
    if not quiet:
        with contextlib.suppress(OSError):  # the corpus may belong to another user
            os.utime(path)  # train_gpt2.py takes the corpus prepared last
        print(f"{corpus_dir} is prepared already, from the same files in the same way")
        if "split_rule" in initial_metadata and "split_rule" not in metadata:
            print(
                f"its documents stay in the splits of an older version, until files or flags "
                f"change; to split them anew, remove {corpus_dir}"
            )
    return metadata


def refuse_other_files(corpus_dir: Path, metadata: dict) -> None:
    """Refuse to overwrite a corpus of other sources, or .bin files of another program.

    Args:
        corpus_dir: Folder of the corpus, data/NAME.
        metadata: Metadata of the corpus that is to be prepared there; "source" suffices.

    Raises:
        FileExistsError: The folder holds such files.
    """
    try:
        old = read_json(corpus_dir / "metadata.json")["source"]
        old_paths = {file["path"] for file in old["files"]}
        old_files = _real_paths(corpus_dir, old)
    except FileNotFoundError:
        if has_unpublished_shards(corpus_dir) and not (corpus_dir / ".work").exists():
            raise FileExistsError(
                f"{min(_shards(corpus_dir))} has no metadata.json beside it, so another program "
                f"may have written it: choose another --corpus NAME, or remove the file"
            ) from None
        return
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # a damaged metadata.json
        return
    new = metadata["source"]
    same_url = old.get("url") and old["url"] == new.get("url")
    if old_files and not (same_url or old_files & _real_paths(corpus_dir, new)):
        raise FileExistsError(
            f"{corpus_dir} was made of other files ({min(old_paths)}): choose another --corpus "
            f"NAME, or remove {corpus_dir}"
        )


def _real_paths(corpus_dir: Path, source: dict) -> set[str]:
    """Return the paths of the files of a corpus, without links."""
    return {os.path.realpath(source_path(corpus_dir, file)) for file in source["files"]}


def has_unpublished_shards(corpus_dir: Path) -> bool:
    """Return whether there are shards without metadata.json.

    A process that is killed while it publishes leaves such shards. A .work folder beside the shards
    marks that they are not .bin files of another program.
    """
    return bool(_shards(corpus_dir)) and not (corpus_dir / "metadata.json").exists()


def _shards(corpus_dir: Path) -> list[Path]:
    return [path for path in corpus_dir.glob("*.bin") if SHARD_NAME.fullmatch(path.name)]
