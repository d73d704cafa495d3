"""Text to token ids and back: GPT-2's vocabulary (or any of tiktoken's), or plain bytes.

    tokenizer = get_tokenizer("gpt2")
    ids = tokenizer.encode("To be, or not to be")      # (6,) uint32
    tokenizer.decode(ids)                              # the same text

A tokenizer is known by its name and the sha256 of its vocabulary.
"""

import codecs
import contextlib
import hashlib
import os
from pathlib import Path

import numpy as np
import tiktoken

_HOST = "https://openaipublic.blob.core.windows.net"
VOCABULARY_FILES = {  # encoding -> path and sha256 of the files that tiktoken builds it from
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


class Tokenizer:
    """What both kinds share.

    name: as given to get_tokenizer. vocab_size: ids lie below it. eot_token: the id that ends a
    document; text never encodes to it. sha256: of the vocabulary, so that two files of ids can
    be known to mean the same.
    """

    name: str
    vocab_size: int
    eot_token: int
    sha256: str

    def encode(self, text: str) -> np.ndarray:
        """Text -> (n,) uint32 ids. A literal "<|endoftext|>" is ordinary text."""
        raise NotImplementedError

    def decode_bytes(self, ids) -> bytes:
        """Ids -> the UTF-8 bytes they stand for, which may begin or end inside a character."""
        raise NotImplementedError

    def decode(self, ids) -> str:
        """Ids -> text; bytes that are no UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode(errors="replace")

    def decode_stream(self, ids):
        """An iterable of ids -> pieces of text, each cut between characters."""
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        for i in ids:
            yield decoder.decode(self.decode_bytes([i]))
        yield decoder.decode(b"", final=True)


class BytesTokenizer(Tokenizer):
    """256 bytes and an end of text: needs no download, and learns fastest on small corpora."""

    name, vocab_size, eot_token = "bytes", 257, 256
    sha256 = hashlib.sha256(bytes(range(256))).hexdigest()

    def encode(self, text):
        return np.frombuffer(text.encode(), np.uint8).astype(np.uint32)

    def decode_bytes(self, ids):
        return b"".join(b"<|endoftext|>" if i == 256 else bytes([i]) for i in ids)


class TiktokenTokenizer(Tokenizer):
    """An encoding of tiktoken's, by its name; its vocabulary files must be there."""

    def __init__(self, name: str):
        os.environ["TIKTOKEN_CACHE_DIR"] = str(vocabulary_folder())  # where tiktoken looks
        self.encoding = tiktoken.get_encoding(name)
        self.name, self.vocab_size = name, self.encoding.n_vocab
        self.eot_token = self.encoding.eot_token
        self.pieces = {}  # id -> the bytes it stands for
        for i in range(self.vocab_size):
            with contextlib.suppress(KeyError):  # gaps: cl100k_base has no id 100256
                self.pieces[i] = self.encoding.decode_single_token_bytes(i)
        lines = (b"%d %s\n" % (i, piece.hex().encode()) for i, piece in self.pieces.items())
        self.sha256 = hashlib.sha256(b"".join(lines)).hexdigest()

    def encode(self, text):
        return self.encoding.encode_to_numpy(text, disallowed_special=())

    def decode_bytes(self, ids):
        unknown = "\ufffd".encode()  # of a gap, which an untrained model may choose
        return b"".join(self.pieces.get(int(i), unknown) for i in ids)


def vocabulary_folder() -> Path:
    """Where vocabulary files lie: $TIKTOKEN_CACHE_DIR, or else data/tokenizers beside this file,
    which, unlike tiktoken's own choice, the temporary folder, is still there tomorrow."""
    default = Path(__file__).resolve().parent / "data" / "tokenizers"
    return Path(os.environ.get("TIKTOKEN_CACHE_DIR") or default)


def missing_files(name: str) -> list[tuple[str, Path, str]]:
    """(address, path, sha256) of each vocabulary file of `name` that isn't there, or is damaged.
    Raises ValueError for an unknown name."""
    known = ["bytes", *tiktoken.list_encoding_names()]
    if name not in known:
        raise ValueError(f"no tokenizer is called {name!r}; there are {', '.join(known)}")
    missing = []
    for file, sha256 in VOCABULARY_FILES.get(name, {}).items():
        url = f"{_HOST}/{file}"
        sha1 = hashlib.sha1(url.encode()).hexdigest()  # the name that tiktoken looks for
        path = vocabulary_folder() / sha1
        if not path.exists() or hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
            missing.append((url, path, sha256))
    return missing


def get_tokenizer(name: str) -> Tokenizer:
    """ "bytes", "gpt2" or another of tiktoken's encodings.

    Raises ValueError for an unknown name, FileNotFoundError where the vocabulary isn't on this
    machine (python prepare_data.py downloads it).
    """
    if name == "bytes":
        return BytesTokenizer()
    if missing := missing_files(name):
        url, path, _ = missing[0]
        raise FileNotFoundError(
            f"the vocabulary of {name!r} isn't here: {path} is missing or damaged; with a network, "
            f"`python prepare_data.py --tokenizer {name}` downloads it from {url}"
        )
    return TiktokenTokenizer(name)
