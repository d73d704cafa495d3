"""Encoders: a fast package that gives the ids of tiktoken, and the checks that it does.

    encoder = open_encoder("fastokens", get_tokenizer("gpt2"))
    ids = encoder.encode_documents(["To be,", "or not"])      # the same array as the tokenizer's

tiktoken defines the ids, also for a tokenizer.json like GPT-2's (json_encoding.py). The package
fastokens gives the same ids for every code point of Unicode (tests/corpus/test_encoders.py), so
there is no text that it must not encode, and about ten times faster. Blocks of each task are
encoded by both all the same. After a difference, the pipeline does all tasks of the corpus with
tiktoken.
"""

import functools
import json
import os
import random
from collections.abc import Iterable
from typing import Any

import numpy as np
from tiktoken_ext.openai_public import ENDOFTEXT

from common.malloc import M_MMAP_THRESHOLD, set_malloc
from common.packages import installed_version, optional
from corpus.boundaries import BOUNDARY
from corpus.json_encoding import TIKTOKEN_VERSION
from corpus.tokenizer import (
    LONG_SPACE,
    LONGEST_SPACE,
    HuggingFaceTokenizer,
    TiktokenTokenizer,
    Tokenizer,
    encodable,
    encode_joined,
)
from corpus.vocabulary_files import vocabulary_paths

REFERENCE = "tiktoken"
FAST = "fastokens"
FAST_VERSION = "0.3.5"  # compared with TIKTOKEN_VERSION by the tests and bench/encoders.py
VOCABULARIES = ("gpt2",)  # encodings of tiktoken for which it was compared; files are like GPT-2's
SMALLEST_CORPUS = 8 << 20  # bytes; below, loading the fast encoder takes longer than it saves
BLOCK_CHARACTERS = 1500  # of a block, which both encode: ten short documents
IDS_PER_BLOCK = 1 << 17  # about the ids of half a million characters, the smallest usual call
# Bytes. python -m bench.encoders memory 75 5 12 60 250 2000 needs 282 MiB with it, 305 without it.
# 1 MB saves 8 MiB more, but then usual calls need large blocks: half as much time again.
LARGE_BLOCK = 4 << 20
FARTHEST_PLACE = 1 << 14  # characters of a long text before a random block: counting takes time


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
        empty for a tokenizer whose texts tiktoken does not encode.
    """
    if _tiktoken_of(tokenizer) is None:
        return REFERENCE, ""
    reason = ""
    if setting == REFERENCE:
        reason = f"--encoder {REFERENCE}"
    elif isinstance(tokenizer, TiktokenTokenizer) and tokenizer.name not in VOCABULARIES:
        reason = f"{FAST} was not compared for the vocabulary {tokenizer.name}"
    elif num_bytes < SMALLEST_CORPUS:
        reason = "the corpus is small"
    elif installed_version(REFERENCE) != TIKTOKEN_VERSION:
        reason = f"{FAST} was compared with {REFERENCE} {TIKTOKEN_VERSION} only"
    else:
        version = installed_version(FAST)
        if version != FAST_VERSION:
            found = f"{FAST} {version} was not compared" if version else f"{FAST} is not installed"
            reason = f"{found}: pip install {FAST}=={FAST_VERSION} encodes faster"
    if reason:
        return REFERENCE, f"encoder: {REFERENCE} ({reason})"
    return FAST, f"encoder: {FAST} {FAST_VERSION} (same ids as {REFERENCE}, checked by samples)"


def _tiktoken_of(tokenizer: Tokenizer) -> TiktokenTokenizer | None:
    """Return the tokenizer of tiktoken that encodes the texts of a tokenizer, or None."""
    if isinstance(tokenizer, HuggingFaceTokenizer):
        return tokenizer.faster
    return tokenizer if isinstance(tokenizer, TiktokenTokenizer) else None


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
    return FastEncoder(tokenizer)


class FastEncoder:
    """Encode texts with the fast package, and compare blocks of the ids with the tokenizer's.

    A block is the next BLOCK_CHARACTERS, in whole documents or in a part of a longer text. The
    first call of a task compares the first block of the task and one that begins in a random text.
    Later calls compare one of the latter kind, at most once per IDS_PER_BLOCK. The choice depends
    on nothing but the texts of the task.

    Args:
        tokenizer: Tokenizer whose ids are right.

    Raises:
        EncoderFailed: The fast package is not on this machine in the right version.
    """

    def __init__(self, tokenizer: Tokenizer):
        reference = _tiktoken_of(tokenizer)
        assert reference is not None
        self.tokenizer = tokenizer
        self.reference = reference
        self.native = _load_native(tokenizer)
        self.generator = random.Random(0)
        self.is_first_call = True
        self.num_ids = 0  # since the last call with a block

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
        self._check([text], ids, np.array([len(ids)]))
        return ids

    def encode_documents(self, texts: Iterable[str]) -> np.ndarray:
        """Encode texts as Tokenizer.encode_documents does; raise the errors of `encode`, too."""
        texts = list(texts)
        longest = max(map(len, texts), default=0)
        if longest >= LONGEST_SPACE and any(_has_long_space(text) for text in texts):
            return self.tokenizer.encode_documents(texts)
        ids = encode_joined(texts, self.reference.eot_text, self.reference.eot_token, self._encode)
        ends = np.flatnonzero(ids == self.tokenizer.eot_token)
        if len(ends) != len(texts):
            raise EncodersDiffer
        self._check(texts, ids, ends)
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

    def _check(self, texts: list[str], ids: np.ndarray, ends: np.ndarray) -> None:
        """Compare the ids of blocks with tiktoken's, in one call of tiktoken for all blocks.

        Args:
            texts: Texts of this call.
            ids: (n,) ids of all texts.
            ends: (len(texts),) end of each text's ids, without its end-of-text token.
        """
        parts = self._choose_parts(texts, len(ids))
        if not parts:
            return
        part_texts = [texts[index][start:stop] for index, start, stop in parts]
        expected = self.tokenizer.encode_documents(part_texts)
        eot = np.array([self.tokenizer.eot_token], np.uint32)
        found = []
        for index, start, stop in parts:
            text_ids = ids[ends[index - 1] + 1 if index else 0 : ends[index]]
            found += [self._ids_of_part(texts[index], text_ids, start, stop), eot]
        if not np.array_equal(np.concatenate(found), expected):
            raise self._difference(texts, parts, found[::2], expected)

    def _choose_parts(self, texts: list[str], num_ids: int) -> list[tuple[int, int, int]]:
        """Return the parts of texts to compare: (index of the text, first character, end)."""
        self.num_ids += num_ids
        is_due = self.is_first_call or self.num_ids >= IDS_PER_BLOCK
        if not texts or not is_due:
            return []
        first_block = _block(texts, 0, 0) if self.is_first_call else []
        self.is_first_call = False
        self.num_ids = 0
        index = self.generator.randrange(len(texts))
        place = 0
        if len(texts[index]) > BLOCK_CHARACTERS:
            place = self.generator.randrange(min(len(texts[index]), FARTHEST_PLACE))
        return first_block + _block(texts, index, place)

    def _ids_of_part(self, text: str, ids: np.ndarray, start: int, stop: int) -> np.ndarray:
        """Return which of the ids of a text stand for its characters start, ..., stop - 1."""
        if start == 0 and stop == len(text):
            return ids
        first_byte = len(encodable(text[:start]).encode())
        end_byte = first_byte + len(encodable(text[start:stop]).encode())
        lengths = _token_lengths(self.reference)[ids[: end_byte + 1]]  # an id has a byte or more
        ends = np.cumsum(lengths, dtype=np.int64)
        first, end = np.searchsorted(ends, [first_byte, end_byte], "right")
        return ids[first:end]

    def _difference(
        self,
        texts: list[str],
        parts: list[tuple[int, int, int]],
        found: list[np.ndarray],
        expected: np.ndarray,
    ) -> EncodersDiffer:
        """Return the error that names the first id that differs."""
        ends = np.flatnonzero(expected == self.tokenizer.eot_token)
        for part, part_ids, right_ids in zip(parts, found, np.split(expected, ends + 1)):
            right_ids = right_ids[:-1]  # without the end-of-text token
            if np.array_equal(part_ids, right_ids):
                continue
            length = min(len(part_ids), len(right_ids))
            different = np.flatnonzero(part_ids[:length] != right_ids[:length])
            num_equal = int(different[0]) if len(different) else length
            index, start, _ = part
            offset = len(encodable(texts[index][:start]).encode())
            offset += len(self.reference.decode_bytes(right_ids[:num_equal]))
            return EncodersDiffer(index, offset)
        raise AssertionError("no part differs")


def _block(texts: list[str], index: int, place: int) -> list[tuple[int, int, int]]:
    """Return the parts of the block that begins in a text: (index, first character, end).

    The first part begins at the first boundary from `place` on. Only the last part may end, at a
    boundary, before its text does.
    """
    parts = []
    num_left = BLOCK_CHARACTERS
    start = _boundary_from(texts[index], place)
    while num_left > 0 and index < len(texts):
        stop = _boundary_from(texts[index], start + num_left)
        parts.append((index, start, stop))
        num_left -= stop - start + 1  # an empty document counts, too
        index += 1
        start = 0
    return parts


def _boundary_from(text: str, place: int) -> int:
    """Return the first boundary at or after a place; the beginning and the end count, too."""
    if place == 0 or place >= len(text):
        return min(place, len(text))
    match = BOUNDARY.search(text, place)
    return match.start() if match else len(text)


@functools.lru_cache(1)
def _token_lengths(tokenizer: TiktokenTokenizer) -> np.ndarray:
    """Return (vocab_size,) uint16: the number of bytes that each id stands for."""
    lengths = np.zeros(tokenizer.vocab_size, np.uint16)
    for token_id, token in tokenizer.token_bytes.items():
        lengths[token_id] = len(token)
    return lengths


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
def _load_native(tokenizer: Tokenizer) -> Any:
    """Return the tokenizer of the fast package.

    One thread does all: the processes of this project are forked, and threads do not outlive a
    fork. The package keeps the words that it has seen in a cache of fixed size.
    """
    if installed_version(FAST) != FAST_VERSION:
        raise EncoderFailed(f"{FAST} {FAST_VERSION} is not installed on every machine")
    os.environ["FASTOKENS_BPE_THREADS"] = "1"
    _return_large_blocks()
    package = optional(f"{FAST}._native", "--encoder auto", FAST)
    return package.Tokenizer.from_json_str(_tokenizer_json(tokenizer))


def _return_large_blocks() -> None:
    """Let glibc give each block of LARGE_BLOCK bytes back to the system as soon as it is freed.

    By default, glibc raises this limit to the largest block that was freed, up to 32 MB, and keeps
    smaller ones.
    """
    set_malloc(M_MMAP_THRESHOLD, LARGE_BLOCK)


def _tokenizer_json(tokenizer: Tokenizer) -> str:
    """Return a vocabulary like GPT-2's as a tokenizer.json without any other special token."""
    if isinstance(tokenizer, HuggingFaceTokenizer):
        model = json.dumps(json.loads(tokenizer.tokenizer.to_str())["model"])
    else:  # encoder.json is inserted as text: parsing it takes as long as two tasks
        paths = vocabulary_paths(tokenizer.name)
        lines = paths["vocab.bpe"].read_text(encoding="utf-8").split("\n")
        merges = json.dumps(lines[1:-1])  # after the version
        vocabulary = paths["encoder.json"].read_text(encoding="utf-8")
        model = f'{{"type": "BPE", "vocab": {vocabulary}, "merges": {merges}}}'
    eot = {"id": tokenizer.eot_token, "content": ENDOFTEXT, "special": True}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    return (
        f'{{"added_tokens": [{json.dumps(eot)}], "pre_tokenizer": {json.dumps(byte_level)}, '
        f'"model": {model}}}'
    )
