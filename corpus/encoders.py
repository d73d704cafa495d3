"""Encoders: a fast package that gives the ids of tiktoken, and the checks that it does.

    encoder = open_encoder("fastokens", get_tokenizer("gpt2"))
    ids = encoder.encode_documents(["To be,", "or not"])      # the same array as the tokenizer's

tiktoken defines the ids. The package fastokens gives the same ids for every code point of Unicode
(tests/corpus/test_encoders.py) and about ten times faster. A small part of each task is encoded by
both all the same. After a difference, the pipeline does all tasks of the corpus with tiktoken.
"""

import functools
import importlib.metadata
import json
import os
from collections.abc import Iterable
from typing import Any

import numpy as np

from common.packages import optional
from corpus.boundaries import BOUNDARY
from corpus.tokenizer import (
    LONG_SPACE,
    LONGEST_SPACE,
    TiktokenTokenizer,
    Tokenizer,
    encodable,
    encode_joined,
)
from corpus.vocabulary_files import vocabulary_paths

REFERENCE = "tiktoken"
FAST = "fastokens"
FAST_VERSION = "0.3.5"  # the version that the tests and bench/encoders.py compared with tiktoken
VOCABULARIES = ("gpt2",)  # names of the tokenizers for which it was compared
SMALLEST_CORPUS = 8 << 20  # bytes; below, loading the fast encoder takes longer than it saves
CHECKED_CHARACTERS = 1 << 13  # of the first call of a task, and of each later call that is checked
CALLS_PER_CHECK = 8


class EncoderFailed(Exception):
    """Raised where the fast encoder cannot be used: its ids differ, or a worker does not have it.

    The ids of the corpus must then come from tiktoken.
    """


class EncodersDiffer(EncoderFailed):
    """Raised where the ids of the fast encoder differ from those of tiktoken.

    Attributes:
        index: Index of the text, among the texts of the call.
        offset: Number of bytes of the text before the first id that differs.
    """

    def __init__(self, index: int = 0, offset: int = 0):
        super().__init__(f"{FAST} and {REFERENCE} give different ids")
        self.index = index
        self.offset = offset


def choose_encoder(setting: str, tokenizer: Tokenizer, num_bytes: int) -> tuple[str, str]:
    """Choose the encoder of a corpus.

    Args:
        setting: "auto" or "tiktoken".
        tokenizer: Tokenizer of the corpus.
        num_bytes: Size of the sources.

    Returns:
        The name of the encoder, and a line that says which encoder is used and why. The line is
        empty for a tokenizer that is not tiktoken's.
    """
    if not isinstance(tokenizer, TiktokenTokenizer):
        return REFERENCE, ""
    reason = ""
    if setting == REFERENCE:
        reason = f"--encoder {REFERENCE}"
    elif tokenizer.name not in VOCABULARIES:
        reason = f"{FAST} is not compared for the vocabulary {tokenizer.name}"
    elif num_bytes < SMALLEST_CORPUS:
        reason = "the corpus is small"
    else:
        version = _installed_version()
        if version != FAST_VERSION:
            found = f"{FAST} {version} is not compared" if version else f"{FAST} is not installed"
            reason = f"{found}: pip install {FAST}=={FAST_VERSION} encodes faster"
    if reason:
        return REFERENCE, f"encoder: {REFERENCE} ({reason})"
    return FAST, f"encoder: {FAST} {FAST_VERSION} (same ids as {REFERENCE}, checked by samples)"


def _installed_version() -> str:
    """Return the version of the fast package, or "" if it is not installed."""
    try:
        return importlib.metadata.version(FAST)
    except importlib.metadata.PackageNotFoundError:
        return ""


def open_encoder(name: str, tokenizer: Tokenizer) -> "Tokenizer | FastEncoder":
    """Return an encoder for one task.

    Args:
        name: Name that choose_encoder returned.
        tokenizer: Tokenizer of the corpus.

    Returns:
        The tokenizer itself, or a FastEncoder with the same `encode` and `encode_documents`.

    Raises:
        EncoderFailed: The fast package is not on this machine in the right version.
    """
    if name == REFERENCE:
        return tokenizer
    assert isinstance(tokenizer, TiktokenTokenizer)
    return FastEncoder(tokenizer)


class FastEncoder:
    """Encode texts with the fast package, and compare a part of the ids with the tokenizer's.

    Args:
        tokenizer: Tokenizer whose ids are right.

    Raises:
        EncoderFailed: The fast package is not on this machine in the right version.
    """

    def __init__(self, tokenizer: TiktokenTokenizer):
        self.tokenizer = tokenizer
        self.native = _load_native(tokenizer.name, tokenizer.eot_token)
        self.num_calls = 0

    def encode(self, text: str) -> np.ndarray:
        """Encode a text.

        Returns:
            (n,) uint32 array of ids.

        Raises:
            CannotEncode: tiktoken cannot encode the text.
            EncodersDiffer: The ids differ from tiktoken's.
            EncoderFailed: The fast package fails.
        """
        if _has_long_space(text):
            return self.tokenizer.encode(text)
        ids = self._encode(text, with_eot=False)
        self._check([text], ids, are_documents=False)
        return ids

    def encode_documents(self, texts: Iterable[str]) -> np.ndarray:
        """Encode texts as Tokenizer.encode_documents does; raise the errors of `encode`, too."""
        texts = list(texts)
        longest = max(map(len, texts), default=0)
        if longest >= LONGEST_SPACE and any(_has_long_space(text) for text in texts):
            return self.tokenizer.encode_documents(texts)
        ids = encode_joined(texts, self.tokenizer.eot_text, self.tokenizer.eot_token, self._encode)
        self._check(texts, ids, are_documents=True)
        return ids

    def _encode(self, text: str, with_eot: bool) -> np.ndarray:
        """Return the ids of a text, in which a literal end of text is the token or ordinary."""
        try:
            ids, _ = self.native.encode_batch_flat(
                [encodable(text)], split_special_tokens=not with_eot
            )
        except Exception as error:  # the package documents no exception
            raise EncoderFailed(f"{FAST} fails: {error}") from None
        return np.frombuffer(ids, "<u4")

    def _check(self, texts: list[str], ids: np.ndarray, are_documents: bool) -> None:
        """Compare a part of the ids with tiktoken's: the beginning or the end of the texts.

        A part begins or ends at a boundary, so its ids are the same alone as in the whole text.
        """
        is_first = self.num_calls == 0
        is_sample = self.num_calls % CALLS_PER_CHECK == 0
        self.num_calls += 1
        if are_documents:  # cheap, so for every call
            num_ends = int(np.count_nonzero(ids == self.tokenizer.eot_token))
            if num_ends != len(texts):
                raise EncodersDiffer
        if not texts or not is_sample:
            return
        part, begin, cut = _beginning(texts) if is_first else _end(texts)
        if not are_documents:
            expected = self.tokenizer.encode(part[0])
        elif is_first and cut:  # the last document of the part is incomplete: without its end
            expected = self.tokenizer.encode_documents(part)[:-1]
        else:
            expected = self.tokenizer.encode_documents(part)
        found = ids[: len(expected)] if is_first else ids[len(ids) - len(expected) :]
        whole = len(part) == len(texts) and not cut
        if np.array_equal(found, expected) and not (whole and len(ids) != len(expected)):
            return
        raise self._difference(found, expected, begin, cut if not is_first else 0)

    def _difference(
        self, found: np.ndarray, expected: np.ndarray, begin: int, cut: int
    ) -> EncodersDiffer:
        """Return the error that names the text of the first id that differs."""
        length = min(len(found), len(expected))
        different = np.flatnonzero(found[:length] != expected[:length])
        first = int(different[0]) if len(different) else length
        ends = np.flatnonzero(expected[:first] == self.tokenizer.eot_token)
        start = int(ends[-1]) + 1 if len(ends) else 0
        offset = len(self.tokenizer.decode_bytes(expected[start:first]))
        return EncodersDiffer(begin + len(ends), offset + (0 if len(ends) else cut))


def _beginning(texts: list[str]) -> tuple[list[str], int, int]:
    """Return the first characters of the texts, as texts.

    Returns:
        The texts, the last of which may be cut; 0, the index of the first of them; and the number
        of characters kept of the last text, or 0 if it is whole.
    """
    part = []
    left = CHECKED_CHARACTERS
    for text in texts:
        if left <= 0:
            break
        boundary = BOUNDARY.search(text, left) if len(text) > left else None
        if boundary:
            part.append(text[: boundary.start()])
            return part, 0, boundary.start()
        part.append(text)
        left -= len(text) + 1
    return part, 0, 0


def _end(texts: list[str]) -> tuple[list[str], int, int]:
    """Return the last characters of the texts, as texts.

    Returns:
        The texts, the first of which may be cut; the index of the first of them; and the number of
        bytes cut from it.
    """
    begin = len(texts)
    left = CHECKED_CHARACTERS
    while begin and left > 0:
        begin -= 1
        text = texts[begin]
        boundary = BOUNDARY.search(text, len(text) - left) if len(text) > left else None
        if boundary:
            num_bytes = len(encodable(text[: boundary.start()]).encode())
            return [text[boundary.start() :], *texts[begin + 1 :]], begin, num_bytes
        left -= len(text) + 1
    return texts[begin:], begin, 0


def _has_long_space(text: str) -> bool:
    """Return whether a text has so many white-space characters in a row that tiktoken may fail.

    So long a run covers a multiple of LONGEST_SPACE, which makes the usual answer cheap.
    """
    if len(text) < LONGEST_SPACE:
        return False
    if not any(text[i].isspace() for i in range(0, len(text), LONGEST_SPACE)):
        return False
    return LONG_SPACE.search(text) is not None


@functools.lru_cache(1)
def _load_native(name: str, eot_token: int) -> Any:
    """Return the tokenizer of the fast package.

    One thread does all: the processes of this project are forked, and threads do not outlive a
    fork. The package keeps the words that it has seen in a cache of fixed size.
    """
    if _installed_version() != FAST_VERSION:
        raise EncoderFailed(f"{FAST} {FAST_VERSION} is not installed on every machine")
    os.environ["FASTOKENS_BPE_THREADS"] = "1"
    package = optional(f"{FAST}._native", "--encoder auto", FAST)
    return package.Tokenizer.from_json_str(_tokenizer_json(name, eot_token))


def _tokenizer_json(name: str, eot_token: int) -> str:
    """Return the vocabulary of GPT-2 as a tokenizer.json."""
    paths = vocabulary_paths(name)
    merges = paths["vocab.bpe"].read_text(encoding="utf-8").split("\n")[1:-1]  # after the version
    vocabulary = json.loads(paths["encoder.json"].read_bytes())
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    settings = {
        "added_tokens": [{"id": eot_token, "content": "<|endoftext|>", "special": True}],
        "pre_tokenizer": byte_level,
        "model": {"type": "BPE", "vocab": vocabulary, "merges": merges},
    }
    return json.dumps(settings)
