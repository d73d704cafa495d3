"""The text that sample.py --score scores: from a file, or standard input, to ids in a file.

    text = tokenize_text("my.txt", "my.txt", checkpoint, tokenizer, folder)
    text.tokens, text.num_bytes, text.has_documents

Files are read by the reader of prepare_data.py, and divided as the corpus of the run was.
"""

import functools
import os
import shutil
import sys
from array import array
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from batches.tokens import Tokens
from corpus.files import find
from corpus.opening import start_of_text
from corpus.planning import refuse_long_text
from corpus.reader import place_of, read
from corpus.sources import InvalidDocument, Source
from corpus.tokenizer import CannotEncode, Tokenizer, encodable


@dataclass(frozen=True)
class ScoredText:
    """A text to score, as token ids.

    Attributes:
        tokens: At least two tokens.
        num_bytes: UTF-8 bytes of each document, or of each part of a running text.
        has_documents: Whether an end-of-text token follows each text.
    """

    tokens: Tokens
    num_bytes: array
    has_documents: bool


def tokenize_text(
    item: str, name: str, checkpoint: dict | None, tokenizer: Tokenizer, folder: Path
) -> ScoredText:
    """Return a text to score, tokenized into a file.

    Args:
        item: What --input of prepare_data.py takes; "-": standard input.
        name: Name of the text, for messages.
        checkpoint: Checkpoint of a run, or None for other weights.
        tokenizer: The tokenizer of the model.
        folder: Folder for the file, and for a copy of standard input.

    Raises:
        OSError: A file cannot be read or written.
        ValueError: The text cannot be read as text or encoded, has fewer than two tokens, or has
            documents that the model does not know.
    """
    ids_path = folder / "ids.bin"
    try:
        sources, has_documents = _find_text(item, checkpoint, folder)
        num_bytes = _write_ids(sources, tokenizer, has_documents, ids_path)
    except ValueError as error:  # about a copy of standard input, perhaps
        raise ValueError(str(error).replace(f"{folder}{os.sep}", "")) from None
    return ScoredText(_open_ids(ids_path, tokenizer, name), num_bytes, has_documents)


def _find_text(item: str, checkpoint: dict | None, folder: Path) -> tuple[list[Source], bool]:
    """Return the files of a text, and whether the text has documents.

    Files are divided into documents as the corpus of the run was. For other weights, a .txt is a
    running text.

    Args:
        item: What --input of prepare_data.py takes; "-": standard input.
        checkpoint: Checkpoint of a run, or None for other weights.
        folder: Folder for a copy of standard input.

    Raises:
        OSError: A file cannot be read.
        ValueError: A file cannot be read as text, or the model knows no documents.
    """
    division, field = _division_and_field(checkpoint["metadata"]) if checkpoint else ("", "")
    if item == "-":
        path = folder / "standard input"
        with open(path, "wb") as f:
            shutil.copyfileobj(sys.stdin.buffer, f)
        sources = [Source(str(path), division=division, start=start_of_text(str(path)))]
    else:
        report = functools.partial(print, file=sys.stderr)
        sources = find(item, division, field, "ignore", report)
    has_documents = not any(source.is_running_text for source in sources)
    if has_documents and checkpoint and not checkpoint["metadata"]["eot_per_document"]:
        raise ValueError(
            f"{item} has documents, and the model was trained on a running text, which has none: "
            f"score a .txt file"
        )
    if not has_documents and not all(source.is_running_text for source in sources):
        raise ValueError(f"{item} has both documents and running texts: score them one by one")
    return sources, has_documents


def _division_and_field(metadata: dict) -> tuple[str, str]:
    """Return how other files are read like the sources of a corpus: division of texts, field.

    If the corpus has documents and none of its sources is a text, a text is one document.

    Args:
        metadata: Metadata of the corpus.
    """
    files = metadata.get("source", {}).get("files", [])
    field = next((file["field"] for file in files if file["format"] != "text"), "")
    if not metadata["eot_per_document"]:
        return "", field
    return next((file["documents"] for file in files if file["format"] == "text"), "file"), field


def _write_ids(
    sources: list[Source], tokenizer: Tokenizer, has_documents: bool, path: Path
) -> array:
    """Tokenize sources into a bare .bin file, a part of a text at a time.

    Args:
        sources: Files of one text, in order.
        tokenizer: The tokenizer of the model.
        has_documents: Whether an end-of-text token follows each text.
        path: File to write.

    Returns:
        The UTF-8 bytes of each document, or of each part of a running text.

    Raises:
        ValueError: A source cannot be read, or not be encoded.
        OSError: A file cannot be read or written.
    """
    num_bytes = array("q")
    with open(path, "wb") as file:
        for source in sources:
            if not has_documents and not tokenizer.divisible:
                refuse_long_text(source, tokenizer)
                source = replace(source, division="file")
            for positions, texts in read(source):
                valid_texts = []
                for text in texts:
                    if isinstance(text, InvalidDocument):
                        raise ValueError(str(text))
                    valid_texts.append(text)
                ids = _encode(source, positions, valid_texts, tokenizer, has_documents)
                file.write(ids.astype(tokenizer.dtype).tobytes())
                num_bytes.extend(len(encodable(text).encode()) for text in valid_texts)
    return num_bytes


def _encode(
    source: Source,
    positions: Iterable[int],
    texts: list[str],
    tokenizer: Tokenizer,
    has_documents: bool,
) -> np.ndarray:
    """Return the ids of some texts of a source, with end-of-text tokens after documents."""
    try:
        if has_documents:
            return tokenizer.encode_documents(texts)
        return np.concatenate([tokenizer.encode(text) for text in texts])
    except CannotEncode:
        for position, text in zip(positions, texts):
            try:
                tokenizer.encode(text)
            except CannotEncode as error:
                raise ValueError(f"{place_of(source, position)}: {error}") from None
        raise


def _open_ids(path: Path, tokenizer: Tokenizer, name: str) -> Tokens:
    """Return the ids of a text that _write_ids wrote.

    Args:
        path: The file.
        tokenizer: The tokenizer of the model.
        name: Name of the text, for the message.

    Raises:
        ValueError: There are fewer than two ids.
    """
    num_tokens = path.stat().st_size // tokenizer.dtype.itemsize
    if num_tokens == 0:
        raise ValueError(f"{name} has no text: there is nothing to score")
    if num_tokens == 1:
        raise ValueError(
            f"{name} has one token: nothing predicts the first token of a text, so a score needs "
            f"two"
        )
    return Tokens(path, tokenizer.dtype, tokenizer.eot_token, tokenizer.vocab_size)
