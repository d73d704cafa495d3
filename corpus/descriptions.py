"""Described data: a folder with a metadata.json or metadata.yaml in tatm's field names.

python prepare_data.py --describe raw/pile      # asks, and writes raw/pile/metadata.json
"""

import datetime
import json
import re
from pathlib import Path

from common.files import atomic_write, read_json
from common.packages import optional


def describe(folder: Path, answers: dict) -> Path:
    """Asks on standard input for what `answers` hasn't got and writes the description.

    answers: name, download_source, description, content_field, corpuses (separated by commas).
    Raises ValueError where `folder` or a sub-corpus is none, or standard input ends too early,
    FileExistsError where there is a description.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder: --describe takes one that holds raw text")
    for old in (folder / "metadata.json", folder / "metadata.yaml"):
        if old.exists():
            raise FileExistsError(f"{old} is there already: edit it, or remove it first")
    folders = sorted(p.name for p in folder.iterdir() if p.is_dir() and p.name[0] != ".")
    questions = {
        "corpuses": ("sub-corpora, separated by commas; - for none", ",".join(folders) or "-"),
        "name": ("name", folder.resolve().name),
        "download_source": ("where it came from", ""),
        "description": ("what it is", ""),
        "content_field": ("field that holds the text", "text"),
    }
    if not folders:
        answers = {"corpuses": "-"} | {k: v for k, v in answers.items() if v}
    for field, (question, default) in questions.items():
        if not answers.get(field):
            try:
                answers[field] = input(f"{question} [{default}]: ").strip() or default
            except EOFError:
                raise ValueError(
                    f"standard input ended before the answer to {question!r}"
                ) from None
        if field == "corpuses":  # before anything else is asked
            names = [name.strip() for name in answers[field].split(",")]
            corpuses = [name for name in names if name.strip("-")]
            if missing := [name for name in corpuses if name not in folders]:
                raise ValueError(f"{folder} has no folder for the sub-corpus {missing[0]!r}")
    text = {
        "name": answers["name"],
        "dataset_path": ".",
        "description": answers["description"],
        "date_downloaded": datetime.date.today().isoformat(),
        "download_source": answers["download_source"],
        "data_content": "text",
        "content_field": answers["content_field"],
        "corpuses": corpuses,
        "corpus_separation_strategy": "data_dirs" if corpuses else None,
        "corpus_data_dir_parent": None,
    }
    with atomic_write(folder / "metadata.json") as f:
        f.write(json.dumps(text, indent=2).encode() + b"\n")
    return folder / "metadata.json"


def described(folder: Path) -> dict | None:
    """The description of a folder: root (Path), field, corpuses, strategy and parent of their
    folders; None where it has none. Raises ValueError for one that is damaged, or leads out of its
    folder."""
    for path in (folder / "metadata.json", folder / "metadata.yaml"):
        if path.is_file():
            break
    else:
        return None
    told = _read_yaml(path) if path.suffix == ".yaml" else read_json(path)
    if not isinstance(told, dict) or not {"name", "data_content"} <= told.keys():
        return None  # somebody else's metadata
    corpuses, parent = told.get("corpuses") or [], told.get("corpus_data_dir_parent") or "."
    names = [told.get("dataset_path") or ".", told.get("content_field") or "text", parent]
    content, configs = told["data_content"], told.get("corpus_separation_strategy") == "configs"
    if not isinstance(corpuses, list) or any(
        type(n) is not str for n in [content, *names, *corpuses]
    ):
        raise ValueError(
            f"{path}: data_content, dataset_path, content_field and corpuses aren't all text"
        )
    if content != "text":
        raise ValueError(f"{path} describes {content!r:.60}, not text")
    root = folder / names[0]
    if root.is_dir() and not root.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{path}: dataset_path {names[0]!r} leads out of {folder}; say '.'")
    if configs and (odd := [name for name in corpuses if not re.fullmatch(r"\w[\w.-]*", name)]):
        raise ValueError(f"{path}: {odd[0]!r} is no name of a config")
    return {
        "root": root if root.is_dir() else folder,
        "field": names[1],
        "corpuses": corpuses,
        "parent": parent,
        "configs": configs,
    }


def _read_yaml(path):
    yaml, data = optional("yaml", str(path), "pyyaml"), path.read_bytes()
    try:
        depth = 0
        for token in yaml.scan(data):
            depth += (kind := type(token).__name__).endswith("StartToken")
            depth -= kind.endswith("EndToken")
            # ten aliases of ten aliases of ten ... take a few bytes to write and all memory to read
            if depth > 20 or kind == "AliasToken":
                raise ValueError("it has an alias (*), or nests too deeply")
        return yaml.safe_load(data)
    except Exception as error:  # what a tag such as !!bool makes of its value fails in its own way
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} is damaged: {reason}") from None


def folder_of(told: dict, corpus: str) -> Path:
    """Where a sub-corpus lies. Raises ValueError where that isn't inside the described folder."""
    path = told["root"] / told["parent"] / corpus
    if not path.is_dir() or told["root"].resolve() not in path.resolve().parents:
        raise ValueError(f"{told['root']} has no folder for its sub-corpus {corpus!r}")
    return path
