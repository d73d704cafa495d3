"""Tasks: what one worker does at once, from chunks of sources to token ids on disk.

    with open_engine("processes", workers=2) as run_tasks:
        for index, counts in run_tasks(tokenize_task, [(job, 0, task.chunks), ...]): ...

The result of a task depends on nothing but its arguments, so the bytes on disk are the same for any
number of workers and either engine, and a finished task is never repeated.
"""

import contextlib
import hashlib
import itertools
import json
import time
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from common.files import atomic_write
from common.hashing import splitmix64
from corpus.encoders import REFERENCE, EncoderFailed, EncodersDiffer, FastEncoder, open_encoder
from corpus.reader import place_of, read
from corpus.sources import BLOCK, InvalidDocument, Source
from corpus.tokenizer import CannotEncode, Tokenizer, encodable, get_tokenizer

SPLIT_RULE = 2  # version of the hash of names in assign_split; version 1 took numbers only


@dataclass(frozen=True)
class Task:
    """Chunks of sources that one worker tokenizes at once.

    Attributes:
        chunks: Chunks, in the order of the corpus.
        num_bytes: Size of the chunks in their files.
    """

    chunks: list[Source]
    num_bytes: int


@dataclass(frozen=True)
class Job:
    """Settings that all tasks of a corpus share.

    Attributes:
        tasks_dir: Folder for the files of finished tasks.
        tokenizer: Name of the tokenizer.
        has_documents: Whether an end-of-text token follows each text.
        max_length: Tokens kept of a document; 0 keeps all.
        train_split_ratio: Share of the documents for train, if `assign_split` decides.
        seed: Seed of `assign_split`.
        on_error: "stop" or "skip", at an invalid document.
        encoder: Name of the encoder, from encoders.choose_encoder. The ids do not depend on it.
    """

    tasks_dir: str
    tokenizer: str
    has_documents: bool
    max_length: int
    train_split_ratio: float
    seed: int
    on_error: str
    encoder: str = REFERENCE


def assign_split(
    source: Source, positions: Sequence[int], train_split_ratio: float, seed: int
) -> dict[str, np.ndarray]:
    """Assign documents to splits.

    If the source has a split, all its documents go there. Otherwise a hash of the seed, the name
    of the source and the position decides, so the result does not depend on order, workers, other
    documents, other sources, or the folder in which the sources lie. A source without a name goes
    by its number.

    Args:
        source: Source or chunk that the documents are from.
        positions: Positions of n documents, as reader.read yields them.
        train_split_ratio: Share of the documents for train.
        seed: Seed of the hash.

    Returns:
        Split name -> (n,) bool array, true for the documents of the split.
    """
    if source.split:
        return {source.split: np.ones(len(positions), bool)}
    seed_hash = splitmix64(np.array([seed], np.int64))
    source_id = _hash_name(source.name) if source.name else source.number
    key = splitmix64(np.array([source_id], np.uint64) ^ seed_hash)
    hashes = splitmix64(np.array(positions, np.uint64) ^ key)
    train = hashes < np.uint64(min(int(train_split_ratio * 2**64), 2**64 - 1))
    return {"train": train, "val": ~train}


def _hash_name(name: str) -> int:
    """Return a 64-bit hash of a name, the same for all ways to encode its characters."""
    data = unicodedata.normalize("NFC", name).encode(errors="surrogatepass")
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "little")


def chunk_ids(chunks: list[Source]) -> list[list]:
    """Return plain values that identify chunks of one corpus."""
    return [[chunk.number, chunk.split, chunk.start, chunk.stop] for chunk in chunks]


def tokenize_task(job: Job, number: int, chunks: list[Source]) -> dict:
    """Tokenize chunks into one file per split: TASKS_DIR/NUMBER.SPLIT.bin.

    The counts are also written to TASKS_DIR/NUMBER.json, last: a task with this file is finished.

    Args:
        job: Settings that all tasks share.
        number: Number of the task, which names its files.
        chunks: Chunks of sources, in order.

    Returns:
        The counts: "chunks" (identifies the task), "splits" (split name -> "tokens", "documents"
        and "bytes" of UTF-8 text), "dropped" (tokens beyond max_length), "skipped" (place and
        reason of each invalid document), "encoder" and "seconds".

    Raises:
        ValueError: A document is invalid, and job.on_error is "stop".
        OSError: A file cannot be read or written.
        EncoderFailed: The fast encoder differs from the tokenizer, or is not on this machine.
    """
    tokenizer = get_tokenizer(job.tokenizer)
    encoder = open_encoder(job.encoder, tokenizer)
    began = time.perf_counter()
    stem = Path(job.tasks_dir) / f"{number:06}"
    skipped = []
    writers = {}
    with contextlib.ExitStack() as files:
        for chunk in chunks:
            for positions, texts in read(chunk):
                valid = np.array([isinstance(text, str) for text in texts])
                for text in texts:
                    if isinstance(text, InvalidDocument):
                        skipped.append(skip_or_stop(text, job.has_documents, job.on_error))
                masks = assign_split(chunk, positions, job.train_split_ratio, job.seed)
                for split, mask in masks.items():
                    chosen = mask & valid
                    if not chosen.any():
                        continue
                    if split not in writers:
                        path = Path(f"{stem}.{split}.bin")
                        file = files.enter_context(atomic_write(path, clean=False))
                        writers[split] = _SplitWriter(job, tokenizer, encoder, file, path, skipped)
                    split_positions = list(itertools.compress(positions, chosen))
                    split_texts = list(itertools.compress(texts, chosen))
                    writers[split].add(chunk, split_positions, split_texts)
        for writer in writers.values():
            writer.flush()
    counts = {
        "chunks": chunk_ids(chunks),
        "splits": {split: writer.split_counts for split, writer in writers.items()},
        "dropped": sum(writer.dropped for writer in writers.values()),
        "skipped": skipped,
        "encoder": job.encoder,
        "seconds": time.perf_counter() - began,
    }
    with atomic_write(Path(f"{stem}.json"), clean=False) as f:
        f.write(json.dumps(counts).encode())
    return counts


class _SplitWriter:
    """Tokenize the texts of one split into a file, BLOCK // 2 characters or more at once."""

    def __init__(
        self,
        job: Job,
        tokenizer: Tokenizer,
        encoder: Tokenizer | FastEncoder,
        file: BinaryIO,
        path: Path,
        skipped: list[str],
    ):
        self.job = job
        self.tokenizer = tokenizer
        self.encoder = encoder  # shared by the writers of a task
        self.file = file
        self.path = path
        self.skipped = skipped  # shared by the writers of a task
        self.split_counts = {"tokens": 0, "documents": 0, "bytes": 0}
        self.dropped = 0
        self.waiting: list[tuple[Source, list[int], list]] = []  # (chunk, positions, texts)
        self.num_characters = 0  # of the texts that wait

    def add(self, chunk: Source, positions: list[int], texts: list) -> None:
        """Let texts wait until there are enough to be tokenized at once."""
        self.waiting.append((chunk, positions, texts))
        self.num_characters += sum(map(len, texts))
        if self.num_characters >= BLOCK // 2:  # what train gets of a block is less than BLOCK
            self.flush()

    def flush(self) -> None:
        """Tokenize and write the texts that wait."""
        texts = [text for _, _, texts in self.waiting for text in texts]
        try:
            ids = self._encode(texts, self.encoder)
        except CannotEncode:
            texts = self._encodable_texts()
            ids = self._encode(texts, self.tokenizer)
        except EncodersDiffer as error:
            raise EncoderFailed(f"{error}: {self._place_of(error)}") from None
        self.waiting = []
        self.num_characters = 0
        self.split_counts["documents"] += len(texts)
        # one call for all texts; the line feeds keep surrogates of two texts from joining
        num_bytes = len(encodable("\n".join(texts)).encode())
        self.split_counts["bytes"] += num_bytes - max(0, len(texts) - 1)
        if self.job.max_length:
            ids = self._drop_beyond_max_length(ids, texts)
        tokenizer = self.tokenizer
        if len(ids) and ids.max() >= tokenizer.vocab_size:  # as uint16, 65,536 would become 0
            raise ValueError(
                f"{tokenizer.name} gave the id {ids.max()}, but its vocabulary has "
                f"{tokenizer.vocab_size} ids: choose another --tokenizer"
            )
        try:
            self.file.write(ids.astype(tokenizer.dtype).tobytes())
        except OSError as error:
            error.filename = str(self.path)  # a failed write does not name its file
            raise
        self.split_counts["tokens"] += len(ids)

    def _encode(self, texts: list[str], encoder: Tokenizer | FastEncoder) -> np.ndarray:
        """Return the ids of texts, with end-of-text tokens after documents."""
        if self.job.has_documents:
            return encoder.encode_documents(texts)
        arrays = [np.empty(0, np.uint32)]
        for index, text in enumerate(texts):
            try:
                arrays.append(encoder.encode(text))
            except EncodersDiffer as error:
                raise EncodersDiffer(index, error.offset) from None
        return np.concatenate(arrays)

    def _place_of(self, error: EncodersDiffer) -> str:
        """Return the place of the text for which the encoders differ."""
        places = [
            (chunk, position) for chunk, positions, _ in self.waiting for position in positions
        ]
        chunk, position = places[error.index]
        if chunk.is_table or self.job.has_documents:
            return place_of(chunk, position)
        return place_of(chunk, position + error.offset)

    def _encodable_texts(self) -> list[str]:
        """Return the texts that the tokenizer can encode, and skip or refuse the others."""
        texts = []
        for chunk, positions, waiting_texts in self.waiting:
            for position, text in zip(positions, waiting_texts):
                try:
                    self.tokenizer.encode(text)
                except CannotEncode as error:
                    # such a text is very long, so reading the file again for its line is cheap
                    offset = len(encodable(text[: error.offset]).encode())
                    if chunk.is_table or self.job.has_documents:
                        offset = 0
                    invalid = InvalidDocument(str(error), place_of(chunk, position + offset))
                    self.skipped.append(
                        skip_or_stop(invalid, self.job.has_documents, self.job.on_error)
                    )
                else:
                    texts.append(text)
        return texts

    def _drop_beyond_max_length(self, ids: np.ndarray, texts: list[str]) -> np.ndarray:
        """Return the first max_length ids of each document, with its end-of-text token."""
        is_end = ids == self.tokenizer.eot_token
        ends = np.flatnonzero(is_end)
        lengths = np.diff(ends, prepend=-1)  # with the end-of-text token
        positions = np.arange(len(ids)) - np.repeat(ends - lengths + 1, lengths)
        keep = (positions < self.job.max_length) | is_end
        for i in np.flatnonzero(lengths > self.job.max_length + 1):
            start = ends[i] - lengths[i] + 1
            kept_ids = ids[start : start + self.job.max_length]
            num_kept_bytes = self.tokenizer.num_bytes_of_beginning(texts[i], kept_ids)
            self.split_counts["bytes"] -= len(encodable(texts[i]).encode()) - num_kept_bytes
        self.dropped += int((~keep).sum())
        return ids[keep]


def skip_or_stop(invalid: InvalidDocument, has_documents: bool, on_error: str) -> str:
    """Return place and reason of an invalid document to skip, or stop with an error.

    Args:
        invalid: The document, or an invalid running text.
        has_documents: Whether the corpus has documents; a running text cannot skip any.
        on_error: "stop" or "skip".

    Raises:
        ValueError: The document is not to be skipped.
    """
    if has_documents and on_error == "skip":
        return str(invalid)
    remedy = "; --on_error skip leaves it out" if has_documents else ""
    raise ValueError(f"{invalid}{remedy}")
