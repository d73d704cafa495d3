"""Descriptions: a metadata.json or metadata.yaml with tatm's fields, in a folder of raw text.

    python prepare_data.py --describe raw/pile      # asks, and writes raw/pile/metadata.json

The description names the folder's sub-corpora and the field that holds the text.
"""

import datetime
import json
import re
from dataclasses import dataclass
from pathlib import Path

from common.files import atomic_write, read_json
from common.packages import optional

DESCRIPTION_NAMES = ("metadata.json", "metadata.yaml")  # the first is also a prepared corpus's
DEEPEST_YAML = 20  # nested collections that a metadata.yaml may have


@dataclass(frozen=True)
class Description:
    """The description of a folder, from its metadata.json or metadata.yaml.

    Attributes:
        root: Folder of the data.
        field: Name of the field that holds the text.
        corpora: Names of the sub-corpora; none if the folder is one corpus.
        parent: Folder of the sub-corpora's folders, relative to `root`.
        configs: Whether the sub-corpora are configs of a `datasets` folder, not folders.
    """

    root: Path
    field: str
    corpora: tuple[str, ...]
    parent: str
    configs: bool

    def folder_of(self, corpus: str) -> Path:
        """Return the folder of a sub-corpus.

        Raises:
            ValueError: The described folder has no folder of this name.
        """
        path = self.root / self.parent / corpus
        if not path.is_dir() or self.root.resolve() not in path.resolve().parents:
            raise ValueError(f"{self.root} has no folder for its sub-corpus {corpus!r}")
        return path


def describe(folder: Path, answers: dict[str, str]) -> Path:
    """Write the description of a folder, and ask on standard input for missing answers.

    Args:
        folder: Folder of raw text.
        answers: Answers that are given already, by field: name, download_source, description,
            content_field, corpuses (separated by commas).

    Returns:
        Path of the metadata.json.

    Raises:
        ValueError: `folder` or a sub-corpus is not a folder, or standard input ends early.
        FileExistsError: The folder has a description.
        OSError: The description cannot be written.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder: --describe takes one that holds raw text")
    for name in DESCRIPTION_NAMES:
        old = folder / name
        if old.exists():
            raise FileExistsError(f"{old} exists already: edit it, or remove it first")
    folders = sorted(p.name for p in folder.iterdir() if p.is_dir() and p.name[0] != ".")
    questions = {
        "corpuses": ("sub-corpora, separated by commas; - for none", ",".join(folders) or "-"),
        "name": ("name", folder.resolve().name),
        "download_source": ("origin of the text, for example an address", ""),
        "description": ("description of the text", ""),
        "content_field": ("field that holds the text", "text"),
    }
    answers = {field: answer for field, answer in answers.items() if answer}
    if not folders:
        answers = {"corpuses": "-"} | answers
    for field, (question, default) in questions.items():
        if field not in answers:
            answers[field] = _ask(question, default) or default
        if field == "corpuses":  # checked before anything else is asked
            corpora = _sub_corpora(answers[field], folder, folders)
    fields = {
        "name": answers["name"],
        "dataset_path": ".",
        "description": answers["description"],
        "date_downloaded": datetime.date.today().isoformat(),
        "download_source": answers["download_source"],
        "data_content": "text",
        "content_field": answers["content_field"],
        "corpuses": corpora,
        "corpus_separation_strategy": "data_dirs" if corpora else None,
        "corpus_data_dir_parent": None,
    }
    with atomic_write(folder / "metadata.json") as f:
        f.write(json.dumps(fields, indent=2).encode() + b"\n")
    return folder / "metadata.json"


def _ask(question, default) -> str:
    """Return the answer to a question on standard input."""
    try:
        return input(f"{question} [{default}]: ").strip()
    except EOFError:
        raise ValueError(f"standard input ended before the answer to {question!r}") from None


def _sub_corpora(answer, folder, folders) -> list[str]:
    """Return the sub-corpora in an answer, separated by commas. A name may have a comma itself.

    Raises:
        ValueError: A name is not one of `folders`.
    """
    if answer == ",".join(folders):  # the default, whatever the names have in them
        return folders
    words = answer.split(",")
    corpora = []
    while words:
        joined = [",".join(words[:end]).strip() for end in range(len(words), 0, -1)]
        name = next((name for name in joined if name in folders), words[0].strip())
        if name.strip("-") and name not in folders:
            raise ValueError(f"{folder} has no folder for the sub-corpus {name!r}")
        if name.strip("-"):
            corpora.append(name)
        words = words[1 + name.count(",") :]
    return corpora


def read_description(folder: Path) -> Description | None:
    """Return the description of a folder, or None if it has none.

    Raises:
        ValueError: The description is damaged, describes data other than text, or names a path
            outside the folder.
    """
    paths = [folder / name for name in DESCRIPTION_NAMES]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        return None
    fields = _read_yaml(path) if path.suffix == ".yaml" else read_json(path)
    if not isinstance(fields, dict) or not {"name", "data_content"} <= fields.keys():
        return None  # metadata of another kind
    content = fields["data_content"]
    dataset_path = fields.get("dataset_path") or "."
    field = fields.get("content_field") or "text"
    parent = fields.get("corpus_data_dir_parent") or "."
    corpora = fields.get("corpuses") or []
    configs = fields.get("corpus_separation_strategy") == "configs"
    texts = [content, dataset_path, field, parent, *(corpora if type(corpora) is list else [None])]
    if any(type(text) is not str for text in texts):
        raise ValueError(
            f"{path} is damaged: data_content, dataset_path, content_field and corpuses must all "
            f"be text"
        )
    if content != "text":
        raise ValueError(f"{path} describes {content!r:.60}, not text")
    root = folder / dataset_path
    if not root.is_dir():
        root = folder
    elif not root.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{path}: dataset_path {dataset_path!r} leads out of {folder}; write '.'")
    for name in corpora if configs else []:
        if not re.fullmatch(r"\w[\w.-]*", name):
            raise ValueError(f"{path}: {name!r} is not the name of a config")
    return Description(root, field, tuple(corpora), parent, configs)


def _read_yaml(path):
    """Return the value that a YAML file holds.

    Raises:
        ValueError: The file is damaged, has an alias, or nests too deeply.
    """
    yaml = optional("yaml", str(path), "pyyaml")
    data = path.read_bytes()
    try:
        depth = 0
        for token in yaml.scan(data):
            token_type = type(token).__name__
            depth += token_type.endswith("StartToken")
            depth -= token_type.endswith("EndToken")
            # ten aliases of ten aliases of ten ... take a few bytes to write and all memory to read
            if depth > DEEPEST_YAML or token_type == "AliasToken":
                raise ValueError("it has an alias (*), or nests too deeply")
        return yaml.safe_load(data)
    except Exception as error:  # the value of a tag such as !!bool may raise anything
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} is damaged: {reason}") from None
