"""Vocabularies: the bytes that each id stands for, from any kind of file.

    vocabulary = vocabulary_of(tokenizer)         # {0: b"!", 1: b'"', ...}
    vocabulary_digest(vocabulary) == GPT2_DIGEST
    tokenizer = tokenizer_of(metadata, folder)    # the one that a corpus was prepared with

Two vocabularies are the same if equal ids stand for equal bytes. GPT-2's is the same from tiktoken,
from vocab.json and from tokenizer.json; the files themselves are never compared.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.files import read_json
from corpus.gpt2_encoding import BYTE_OF_LETTER
from corpus.tokenizer import HuggingFaceTokenizer, Tokenizer, get_tokenizer
from corpus.vocabulary_files import restore_vocabulary

GPT2_DIGEST = "c0cbb77810dc181ea5f911df052ec89a82d5e1fd33da8e41adf71a54a9735656"

LETTERS = {byte: letter for letter, byte in BYTE_OF_LETTER.items()}  # of GPT-2's files


def tokenizer_of(metadata: dict, owner: str | Path) -> Tokenizer:
    """Return the tokenizer that a corpus was prepared with.

    Args:
        metadata: Metadata of a corpus, perhaps from a checkpoint.
        owner: The corpus, or the run that has the checkpoint, for the message. The folder of a
            corpus may have a copy of a vocabulary that is missing on this machine.

    Raises:
        ValueError: The name of the tokenizer now stands for another vocabulary.
        FileNotFoundError: The vocabulary is not on this machine.
    """
    name = metadata["tokenizer"]["name"]
    restore_vocabulary(name, metadata["tokenizer"]["sha256"], Path(owner))
    tokenizer = get_tokenizer(name)
    if tokenizer.sha256 != metadata["tokenizer"]["sha256"]:
        raise ValueError(
            f"{owner} was made with another vocabulary of the name {name}: restore its file, or "
            f"run python prepare_data.py again, with the same flags"
        )
    return tokenizer


def same_vocabulary(metadata: dict, other: dict) -> bool:
    """Return whether two corpora have one vocabulary, perhaps from differently named files.

    Args:
        metadata: Metadata of a corpus.
        other: Metadata of another corpus, or of the same corpus at another time.

    Returns:
        False, too, if the names differ and a vocabulary is not on this machine as it was.
    """
    if metadata["tokenizer"]["sha256"] == other["tokenizer"]["sha256"]:
        return True
    try:
        vocabularies = [vocabulary_of(tokenizer_of(each, "")) for each in (metadata, other)]
    except (FileNotFoundError, ValueError):
        return False
    return vocabularies[0] == vocabularies[1]


def check_one_vocabulary(corpora: Mapping[Any, dict]) -> None:
    """Check that all corpora of a mixture have the vocabulary of the first one.

    Args:
        corpora: Folder of a corpus -> its metadata.

    Raises:
        ValueError: A corpus has another vocabulary.
    """
    (first, expected), *others = corpora.items()
    for folder, metadata in others:
        if not same_vocabulary(expected, metadata):
            raise ValueError(
                f"{folder} ({metadata['tokenizer']['name']}) has another vocabulary than {first}: "
                f"prepare {folder} again with --tokenizer {expected['tokenizer']['name']}"
            )


def vocabulary_of(tokenizer: Tokenizer) -> dict[int, bytes]:
    """Return the bytes that each id of a tokenizer stands for."""
    if isinstance(tokenizer, HuggingFaceTokenizer):
        return parse_tokenizer_json(json.loads(tokenizer.tokenizer.to_str()))
    return tokenizer.token_bytes


def read_vocabulary(folder: Path) -> dict[int, bytes] | None:
    """Return the vocabulary of a folder of weights, or None if the folder has none.

    Args:
        folder: Folder in the Hugging Face layout. tokenizer.json is read first, then vocab.json.

    Raises:
        ValueError: The file is damaged.
        OSError: The file cannot be read.
    """
    parsers = {"tokenizer.json": parse_tokenizer_json, "vocab.json": parse_vocab_json}
    for name, parse in parsers.items():
        path = folder / name
        if path.exists():
            content = read_json(path)
            try:
                return parse(content)
            except (KeyError, TypeError, AttributeError, ValueError):
                raise ValueError(f"{path} is damaged: it does not hold a vocabulary") from None
    return None


def parse_tokenizer_json(content: dict[str, Any]) -> dict[int, bytes]:
    """Return the vocabulary of a tokenizer.json.

    Other files than this one raise KeyError, TypeError, AttributeError or ValueError.

    Args:
        content: The value that the file holds.
    """
    pairs = content["model"]["vocab"]
    if isinstance(pairs, dict):  # BPE, WordPiece and WordLevel
        texts = {int(i): text for text, i in pairs.items()}
    else:  # Unigram: (text, score) of each id
        texts = {i: text for i, (text, _) in enumerate(pairs)}
    steps = json.dumps([content.get("pre_tokenizer"), content.get("decoder")])
    to_bytes = _bytes_of_letters if '"ByteLevel"' in steps else str.encode
    vocabulary = {i: to_bytes(text) for i, text in texts.items()}
    for token in content.get("added_tokens") or []:
        vocabulary[int(token["id"])] = token["content"].encode()
    return vocabulary


def parse_vocab_json(content: dict[str, int]) -> dict[int, bytes]:
    """Return the vocabulary of a vocab.json, which is in the letters of GPT-2's files.

    Other files than this one raise TypeError, AttributeError or ValueError.

    Args:
        content: The value that the file holds: text of a token -> id.
    """
    return {int(i): _bytes_of_letters(text) for text, i in content.items()}


def _bytes_of_letters(text: str) -> bytes:
    if all(letter in BYTE_OF_LETTER for letter in text):
        return bytes(BYTE_OF_LETTER[letter] for letter in text)
    return text.encode()  # a special token


def first_difference(vocabulary: dict[int, bytes], other: dict[int, bytes]) -> int | None:
    """Return the lowest id of a vocabulary that stands for other bytes in another one, or None.

    The other vocabulary may have more ids. Example: {0: b"a", 1: b"b"}, {0: b"a", 1: b"c"} -> 1.

    Args:
        vocabulary: Id -> bytes.
        other: Id -> bytes.
    """
    different = (i for i, token in vocabulary.items() if other.get(i) != token)
    return min(different, default=None)
