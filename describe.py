"""Described data: a folder with a metadata.json or metadata.yaml in tatm's field names.

python prepare_data.py --describe raw/pile      # asks, and writes raw/pile/metadata.json
"""

import datetime
import json
from pathlib import Path

from common import atomic_write, optional


def describe(folder: Path, answers: dict) -> Path:
    """Asks on standard input for what `answers` hasn't got and writes the description.

    answers: name, download_source, description, content_field, corpuses (separated by commas).
    Raises ValueError where `folder` is none, or standard input ends too early.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder: --describe takes one that holds raw text")
    if (folder / "metadata.json").exists() and not described(folder):
        raise ValueError(f"{folder / 'metadata.json'} is no description, but of something else")
    folders = sorted(p.name for p in folder.iterdir() if p.is_dir() and p.name[0] != ".")
    questions = {
        "name": ("name", folder.resolve().name),
        "download_source": ("where it came from", ""),
        "description": ("what it is", ""),
        "content_field": ("field that holds the text", "text"),
        "corpuses": ("sub-corpora, separated by commas; - for none", ",".join(folders) or "-"),
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
    corpuses = [name.strip() for name in answers["corpuses"].split(",") if name.strip(" -")]
    missing = [name for name in corpuses if name not in folders]
    if missing:
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
    folders; None where it has none. Raises ValueError for a damaged one."""
    for path in (folder / "metadata.json", folder / "metadata.yaml"):
        if path.is_file():
            break
    else:
        return None
    yaml = optional("yaml", str(path), "pyyaml") if path.suffix == ".yaml" else None
    damage = (yaml.YAMLError,) if yaml else ()
    try:
        text = path.read_text(encoding="utf-8")
        told = yaml.safe_load(text) if yaml else json.loads(text)
    except (ValueError, RecursionError, *damage) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} is damaged: {reason}") from None
    if not isinstance(told, dict) or not {"name", "data_content"} <= told.keys():
        return None  # somebody else's metadata
    corpuses, parent = told.get("corpuses") or [], told.get("corpus_data_dir_parent") or "."
    names = [told.get("dataset_path") or ".", told.get("content_field") or "text", parent]
    if not isinstance(corpuses, list) or not all(isinstance(n, str) for n in names + corpuses):
        raise ValueError(f"{path}: dataset_path, content_field and corpuses aren't all text")
    if told["data_content"] != "text":
        raise ValueError(f"{path} describes {told['data_content']}, not text")
    root = folder / names[0]
    return {
        "root": root if root.is_dir() else folder,
        "field": names[1],
        "corpuses": corpuses,
        "parent": parent,
        "configs": told.get("corpus_separation_strategy") == "configs",
    }


def folder_of(told: dict, corpus: str) -> Path:
    """Where a sub-corpus lies. Raises ValueError where that isn't inside the described folder."""
    path = told["root"] / told["parent"] / corpus
    if told["root"].resolve() not in path.resolve().parents or not path.is_dir():
        raise ValueError(f"{told['root']} has no folder for its sub-corpus {corpus!r}")
    return path
