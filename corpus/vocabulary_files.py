"""Vocabulary files: where they are, and how they come to this machine.

fetch_vocabulary("gpt2")        # downloads what is missing into vocabulary_folder()
missing_files("gpt2")           # [] afterwards

A vocabulary that comes from a file or was trained (bpe.py) is kept in vocabulary_folder(), and
beside each corpus that has it, so that a corpus can be moved to another machine.
"""

import hashlib
import os
import re
from pathlib import Path

import tiktoken

from common.files import atomic_write
from common.settings import near
from corpus.download import download, sha256_of

KEPT_NAME = re.compile(r"(.+)-[0-9a-f]{12}\.(json|tiktoken)")  # a user's file, or trained
HOST = "https://openaipublic.blob.core.windows.net"
VOCABULARY_FILES = {  # encoding -> (path -> sha256) of the files of its vocabulary
    "gpt2": {
        "gpt-2/encodings/main/vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
        "gpt-2/encodings/main/encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    },
    "r50k_base": {
        "encodings/r50k_base.tiktoken": "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"
    },
    "p50k_base": {
        "encodings/p50k_base.tiktoken": "94b5ca7dff4d00767bc256fdd1b27e5b17361d7b8a5f968547f9f23eb70d2069"
    },
    "cl100k_base": {
        "encodings/cl100k_base.tiktoken": "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7"
    },
    "o200k_base": {
        "encodings/o200k_base.tiktoken": "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d"
    },
}  # fmt: skip
VOCABULARY_FILES["p50k_edit"] = VOCABULARY_FILES["p50k_base"]
VOCABULARY_FILES["o200k_harmony"] = VOCABULARY_FILES["o200k_base"]
ALIASES = {"distilgpt2": "gpt2"}  # name -> encoding with the same vocabulary
SMALLEST_BPE = 257  # the bytes and the end-of-text token
LARGEST_BPE = 1_000_000
COPIES_BESIDE_CORPUS = ("tokenizer.json", "tokenizer.tiktoken")


def vocabulary_folder() -> Path:
    """Return the folder of vocabulary files: $TIKTOKEN_CACHE_DIR, or data/tokenizers.

    tiktoken's own default is the system's temporary folder, which many systems empty at times.
    """
    default = Path(__file__).resolve().parent.parent / "data" / "tokenizers"
    return Path(os.environ.get("TIKTOKEN_CACHE_DIR") or default)


def use_prefetched_vocabularies(data_dir: str | Path) -> None:
    """Use the vocabularies that --prefetch has stored in DATA_DIR/tokenizers, if there are any."""
    folder = (Path(data_dir) / "tokenizers").resolve()
    if folder.is_dir():
        os.environ.setdefault("TIKTOKEN_CACHE_DIR", str(folder))


def bpe_size(name: str) -> int | None:
    """Return the number of ids that "bpe:N" asks for, or None for another name.

    Args:
        name: Value of --tokenizer.

    Raises:
        ValueError: N is not a number, or out of range.
    """
    prefix, colon, digits = name.partition(":")
    if prefix != "bpe" or not colon:
        return None
    if not re.fullmatch("[0-9]{1,9}", digits) or not SMALLEST_BPE <= int(digits) <= LARGEST_BPE:
        raise ValueError(
            f"--tokenizer bpe:N takes a number of ids from {SMALLEST_BPE} (the bytes and the "
            f"end-of-text token) to {LARGEST_BPE:,}, as in bpe:4096, not {name!r}"
        )
    return int(digits)


def full_name(name: str) -> str:
    """Return the name of the vocabulary that a short name stands for.

    Example: distilgpt2 gives gpt2, and mine-bpe4096 gives mine-bpe4096-1a2b3c4d5e6f.json if such a
    file is kept in the vocabulary folder. Other names are returned as they are.

    Args:
        name: Name or path that get_tokenizer takes.

    Raises:
        ValueError: Several files have this name, with different vocabularies.
    """
    if name in ("bytes", *ALIASES, *tiktoken.list_encoding_names()) or is_file_name(name):
        return ALIASES.get(name, name)
    found = {sha256_of(path): path.name for path, short in _kept_files() if short == name}
    if len(found) > 1:
        raise ValueError(
            f"several vocabularies are called {name}: choose --tokenizer "
            f"{' or '.join(sorted(found.values()))}"
        )
    return next(iter(found.values()), name)


def _kept_files() -> list[tuple[Path, str]]:
    """Return each vocabulary that is kept in the vocabulary folder, and its name without a hash."""
    folder = vocabulary_folder()
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    matches = [(path, KEPT_NAME.fullmatch(path.name)) for path in files]
    return [(path, match[1]) for path, match in matches if match]


def check_tokenizer_name(name: str) -> None:
    """Check that a tokenizer of this name exists. Its vocabulary need not be on this machine.

    Args:
        name: Name or path that get_tokenizer takes.

    Raises:
        ValueError: The name is unknown.
        FileNotFoundError: The name is the path of a file that does not exist.
    """
    name = full_name(name)
    if bpe_size(name) is not None:
        return
    if is_file_name(name):
        if not (Path(name).is_file() or (vocabulary_folder() / name).is_file()):
            raise FileNotFoundError(f"{name} does not exist, nor does {vocabulary_folder() / name}")
        return
    names = ["bytes", "bpe:N", *ALIASES, *tiktoken.list_encoding_names()]
    if name not in names:
        names += dict.fromkeys(short for _, short in _kept_files())
        raise ValueError(
            f"no tokenizer is called {name!r}: choose one of {', '.join(names)}, or the path of a "
            f"tokenizer.json or a .tiktoken file" + near(name, names)
        )


def missing_files(name: str) -> list[tuple[str, Path, str]]:
    """Return (url, path, sha256) of each vocabulary file that is missing or damaged.

    Args:
        name: Name or path that get_tokenizer takes.

    Raises:
        ValueError: The name is unknown.
        FileNotFoundError: The name is the path of a file that does not exist.
    """
    check_tokenizer_name(name)
    name = full_name(name)
    missing = []
    for file, sha256 in VOCABULARY_FILES.get(name, {}).items():
        path = vocabulary_folder() / cache_name(file)
        if not path.exists() or sha256_of(path) != sha256:
            missing.append((f"{HOST}/{file}", path, sha256))
    return missing


def vocabulary_paths(name: str) -> dict[str, Path]:
    """Return the name at OpenAI -> path of each vocabulary file of an encoding of tiktoken.

    Example: {"vocab.bpe": ..., "encoder.json": ...} for gpt2. Other tokenizers have no such file.
    """
    folder = vocabulary_folder()
    files = VOCABULARY_FILES.get(name, {})
    return {file.rpartition("/")[2]: folder / cache_name(file) for file in files}


def cache_name(file: str) -> str:
    """Return the name under which tiktoken looks for a vocabulary file."""
    return hashlib.sha1(f"{HOST}/{file}".encode()).hexdigest()


def fetch_vocabulary(name: str) -> None:
    """Download the vocabulary files that are missing.

    Args:
        name: Name or path that get_tokenizer takes.

    Raises:
        ConnectionError: A file cannot be downloaded.
        ValueError: The name is unknown.
        FileNotFoundError: The name is the path of a file that does not exist.
    """
    for url, path, sha256 in missing_files(name):
        try:
            download([url], path, sha256=sha256)
        except ConnectionError as error:
            raise ConnectionError(
                f"{error}; try again later, set TIKTOKEN_CACHE_DIR to a folder that has "
                f"{path.name}, or prepare data with --tokenizer bytes"
            ) from None


def copy_vocabulary(name: str, folder: Path) -> None:
    """Copy the vocabulary files that are neither missing nor damaged.

    Args:
        name: Name or path that get_tokenizer takes.
        folder: Folder to copy the files to.

    Raises:
        ValueError: The name is unknown.
        FileNotFoundError: The name is the path of a file that does not exist.
    """
    missing = {path for _, path, _ in missing_files(name)}
    name = full_name(name)
    paths = [*vocabulary_paths(name).values()]
    if is_file_name(name) and not Path(name).is_file():
        paths = [vocabulary_folder() / name]  # kept there
    for path in paths:
        if path not in missing and path.parent.resolve() != folder.resolve():
            folder.mkdir(parents=True, exist_ok=True)
            with atomic_write(folder / path.name) as f:
                f.write(path.read_bytes())


def is_file_name(name: str) -> bool:
    """Return whether the name of a tokenizer is the path of a file, or of a copy of a file."""
    return name.endswith((".json", ".tiktoken"))


def copy_beside_corpus(name: str, corpus_dir: Path) -> None:
    """Copy the file of a vocabulary to a corpus: tokenizer.json or tokenizer.tiktoken.

    A copy of the vocabulary that the corpus had before is removed.

    Args:
        name: Name of the tokenizer in metadata.json.
        corpus_dir: Folder of the corpus, data/NAME.

    Raises:
        OSError: A file cannot be read or written.
    """
    for copy in COPIES_BESIDE_CORPUS:
        (corpus_dir / copy).unlink(missing_ok=True)
    if is_file_name(name):
        with atomic_write(_copy_beside(name, corpus_dir)) as f:
            f.write((vocabulary_folder() / name).read_bytes())


def restore_vocabulary(name: str, sha256: str, corpus_dir: Path) -> None:
    """Copy the file beside a corpus to the vocabulary folder, if the file is missing there.

    A copy of another vocabulary is not taken.

    Args:
        name: Name of the tokenizer in metadata.json.
        sha256: Its hash there.
        corpus_dir: Folder of the corpus, data/NAME.

    Raises:
        OSError: The file cannot be read or written.
    """
    if not is_file_name(name) or (vocabulary_folder() / name).exists():
        return
    copy = _copy_beside(name, corpus_dir)
    found = sha256_of(copy) if copy.is_file() else ""
    # a file that was copied here has its hash in its name, a trained one in metadata.json
    if found and (found == sha256 or f"-{found[:12]}." in name):
        vocabulary_folder().mkdir(parents=True, exist_ok=True)
        with atomic_write(vocabulary_folder() / name) as f:
            f.write(copy.read_bytes())


def _copy_beside(name: str, corpus_dir: Path) -> Path:
    """Return the path of the copy of a vocabulary that lies beside a corpus."""
    return corpus_dir / f"tokenizer{Path(name).suffix}"
