"""Text to token ids and back: GPT-2's vocabulary (or any of tiktoken's), or plain bytes.

    tokenizer = get_tokenizer("gpt2")
    ids = tokenizer.encode("To be, or not to be")      # (6,) uint32
    tokenizer.decode(ids)                              # the same text

A tokenizer is known by its name and the sha256 of its vocabulary.
"""

import base64
import codecs
import functools
import hashlib
import itertools
import os
from pathlib import Path

import numpy as np
import tiktoken
import tiktoken_ext.openai_public

from common.files import atomic_write
from common.packages import optional
from common.settings import near
from corpus.download import download, sha256_of

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
ALIASES = {"distilgpt2": "gpt2"}  # names of the same vocabulary
VOCABULARY_FILES["o200k_harmony"] = VOCABULARY_FILES["o200k_base"]


class Tokenizer:
    """What both kinds share.

    name: as given to get_tokenizer. vocab_size: ids lie below it. eot_token: the id that ends a
    document; text never encodes to it. sha256: of the vocabulary, so that two files of ids can
    be known to mean the same. divisible: a text may be cut at reader.py's boundaries. pieces: id
    -> the bytes it stands for.
    """

    name: str
    vocab_size: int
    eot_token: int
    sha256: str
    divisible: bool = True
    pieces: dict[int, bytes]

    def encode(self, text: str) -> np.ndarray:
        """Text -> (n,) uint32 ids. A literal "<|endoftext|>" is ordinary text."""
        raise NotImplementedError

    @property
    def dtype(self) -> np.dtype:
        """Of the ids on disk: uint16 where they fit, else uint32, little-endian."""
        return np.dtype("<u2" if self.vocab_size <= 1 << 16 else "<u4")

    def encode_documents(self, texts) -> np.ndarray:
        """Texts -> (n,) uint32 ids, an end of text behind each text's."""
        end = np.array([self.eot_token], np.uint32)
        return np.concatenate([part for text in texts for part in (self.encode(text), end)])

    def decode_bytes(self, ids) -> bytes:
        """Ids -> the UTF-8 bytes they stand for, which may begin or end inside a character."""
        unknown = "\ufffd".encode()  # of a gap, which an untrained model may choose
        return b"".join([self.pieces.get(i, unknown) for i in map(int, ids)])

    def decode(self, ids) -> str:
        """Ids -> text; bytes that are no UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode(errors="replace")

    def decode_stream(self, ids):
        """An iterable of ids -> pieces of text, each cut between characters; one that the last id
        leaves unfinished isn't shown."""
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        for i in ids:
            yield decoder.decode(self.decode_bytes([i]))


class BytesTokenizer(Tokenizer):
    """256 bytes and an end of text: needs no download, and learns fastest on small corpora."""

    name, vocab_size, eot_token = "bytes", 257, 256
    sha256 = hashlib.sha256(bytes(range(256))).hexdigest()
    pieces = {i: bytes([i]) for i in range(256)} | {256: b"<|endoftext|>"}

    def encode(self, text):
        return np.frombuffer(encodable(text).encode(), np.uint8).astype(np.uint32)


class TiktokenTokenizer(Tokenizer):
    """An encoding of tiktoken's, or one like it, under a name of its own."""

    def __init__(self, name: str, encoding: tiktoken.Encoding):
        self.name, self.encoding = name, encoding
        self.vocab_size, self.eot_token = encoding.n_vocab, encoding.eot_token
        self.eot = encoding.decode([self.eot_token])
        special = {name.encode(): i for name, i in encoding._special_tokens.items()}
        ids = (encoding._mergeable_ranks | special).items()
        self.pieces = dict(sorted((i, piece) for piece, i in ids))
        lines = (b"%d %s\n" % (i, piece.hex().encode()) for i, piece in self.pieces.items())
        self.sha256 = hashlib.sha256(b"".join(lines)).hexdigest()

    def encode(self, text):
        return self.encoding.encode_to_numpy(encodable(text), disallowed_special=())

    def encode_documents(self, texts):
        """One call for many: each has a fixed cost, ten times that of a short document."""
        runs, special = [], {self.eot}
        for marked, run in itertools.groupby(texts, key=lambda text: self.eot in text):
            if marked:  # the literal marker is no boundary: one by one
                runs.append(super().encode_documents(run))
                continue
            joined = encodable(self.eot.join([*run, ""]))
            ids = self.encoding.encode_to_numpy(
                joined, allowed_special=special, disallowed_special=()
            )
            runs.append(ids)
        return np.concatenate(runs)


class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer.json, through the `tokenizers` package."""

    divisible = False
    ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>", "[SEP]")

    def __init__(self, name: str, path: Path):
        tokenizers = optional("tokenizers", path)
        try:
            self.tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the package raises no narrower type
            raise ValueError(f"{path} is no tokenizer.json: {error}") from None
        self.tokenizer.encode_special_tokens = True  # their literal text is ordinary text
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.name, self.sha256 = name, sha256_of(path)
        ids = self.tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(ids.values(), default=0) + 1
        if self.vocab_size > 2 * len(ids) + 1:
            raise ValueError(f"{path} is no vocabulary: most of its ids have no piece")
        end = next((end for end in self.ENDS if end in ids), None)
        if end is None:
            raise ValueError(f"{path} has no end of text: none of {', '.join(self.ENDS)}")
        self.eot_token = ids[end]
        if self.eot_token in self.encode(end):
            raise ValueError(f"{path}: {end} is no special token there, so any text may hold it")

    def _encode(self, texts):
        try:
            texts = [encodable(text) for text in texts]
            return self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        except Exception as error:  # the package raises no narrower type
            raise ValueError(f"{self.name} can't encode every text: {error}") from None

    def encode(self, text):
        return np.array(self._encode([text])[0].ids, np.uint32)

    def encode_documents(self, texts):
        encodings = self._encode(texts)
        return np.array([i for e in encodings for i in (*e.ids, self.eot_token)], np.uint32)

    def decode_bytes(self, ids):
        return self.tokenizer.decode([int(i) for i in ids], skip_special_tokens=False).encode()

    def decode_stream(self, ids):
        from tokenizers.decoders import DecodeStream

        stream = DecodeStream(skip_special_tokens=False)
        for i in ids:
            yield stream.step(self.tokenizer, int(i)) or ""


def encodable(text: str) -> str:
    """The text as tiktoken takes it: surrogates paired where they are pairs, else U+FFFD."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def vocabulary_folder() -> Path:
    """Where vocabulary files lie: $TIKTOKEN_CACHE_DIR, or else data/tokenizers beside this file,
    which, unlike tiktoken's own choice, the temporary folder, is still there tomorrow."""
    default = Path(__file__).resolve().parent.parent / "data" / "tokenizers"
    return Path(os.environ.get("TIKTOKEN_CACHE_DIR") or default)


def vocabularies_beside(data_dir) -> None:
    """Lets vocabularies be found that were prefetched with the corpora of `data_dir`."""
    folder = (Path(data_dir) / "tokenizers").resolve()
    if folder.is_dir():
        os.environ.setdefault("TIKTOKEN_CACHE_DIR", str(folder))


def missing_files(name: str) -> list[tuple[str, Path, str]]:
    """(address, path, sha256) of each vocabulary file of `name` that isn't there, or is damaged.
    Raises ValueError for an unknown name, FileNotFoundError for a path without a file."""
    if _is_file(name):
        if not (Path(name).is_file() or (vocabulary_folder() / name).is_file()):
            raise FileNotFoundError(f"{name} isn't there, nor in {vocabulary_folder()}")
        return []
    name = ALIASES.get(name, name)
    known = ["bytes", *ALIASES, *tiktoken.list_encoding_names()]
    if name not in known:
        raise ValueError(
            f"no tokenizer is called {name!r}; there are {', '.join(known)}, and the path of a "
            f"tokenizer.json or a .tiktoken file" + near(name, known)
        )
    missing = []
    for file, sha256 in VOCABULARY_FILES.get(name, {}).items():
        path = vocabulary_folder() / _kept_as(file)
        if not path.exists() or sha256_of(path) != sha256:
            missing.append((f"{_HOST}/{file}", path, sha256))
    return missing


def _kept_as(file: str) -> str:
    """The name that tiktoken looks for."""
    return hashlib.sha1(f"{_HOST}/{file}".encode()).hexdigest()


def fetch_vocabulary(name: str) -> None:
    """Downloads the vocabulary files of `name` that are missing. Raises ConnectionError, and what
    missing_files raises."""
    for url, path, sha256 in missing_files(name):
        try:
            download([url], path, sha256=sha256)
        except ConnectionError as error:
            raise ConnectionError(
                f"{error}; try again later, set TIKTOKEN_CACHE_DIR to a folder that has "
                f"{path.name}, or prepare data with --tokenizer bytes"
            ) from None


def copy_vocabulary(name: str, folder: Path) -> None:
    """Copies the vocabulary files of `name` to `folder`, those that are there and whole. Raises
    what missing_files raises."""
    missing = {path for _, path, _ in missing_files(name)}
    files = VOCABULARY_FILES.get(ALIASES.get(name, name), {})
    paths = [vocabulary_folder() / _kept_as(file) for file in files]
    if _is_file(name) and not Path(name).is_file():
        paths = [vocabulary_folder() / name]  # a copy
    for path in paths:
        if path not in missing and path.parent.resolve() != folder.resolve():
            folder.mkdir(parents=True, exist_ok=True)
            with atomic_write(folder / path.name) as f:
                f.write(path.read_bytes())


def get_tokenizer(name: str) -> Tokenizer:
    """ "bytes", "gpt2" or another of tiktoken's encodings, "distilgpt2", or the path of a Hugging
    Face tokenizer.json or of a .tiktoken file.

    Raises ValueError for an unknown name or a damaged file, FileNotFoundError where the vocabulary
    isn't on this machine (python prepare_data.py downloads it).
    """
    if _is_file(name) and Path(name).is_file():
        name = _keep_copy(Path(name))
    name = ALIASES.get(name, name)
    if name == "bytes":
        return BytesTokenizer()
    if missing := missing_files(name):
        url, path, _ = missing[0]
        raise FileNotFoundError(
            f"the vocabulary of {name!r} isn't here: {path} is missing or damaged; with a network, "
            f"`python prepare_data.py --tokenizer {name}` downloads it from {url}"
        )
    return _load(name, vocabulary_folder())


@functools.lru_cache(1)  # a fork of this process has it then, too
def _load(name: str, folder: Path) -> Tokenizer:
    if _is_file(name):
        return _read_file(name, folder / name)
    os.environ["TIKTOKEN_CACHE_DIR"] = str(folder)  # where tiktoken looks
    return TiktokenTokenizer(name, tiktoken.get_encoding(name))


def _is_file(name: str) -> bool:
    return name.endswith((".json", ".tiktoken"))


def _read_file(name: str, path: Path) -> Tokenizer:
    if path.suffix == ".json":
        return HuggingFaceTokenizer(name, path)
    return TiktokenTokenizer(name, _encoding_of(path))


def _keep_copy(path: Path) -> str:
    """Copies a tokenizer's file to where vocabularies are kept, so that a corpus can be read where
    the original isn't; returns the name to find it by, that of an encoding if the file is its."""
    data = path.read_bytes()
    sha256 = hashlib.sha256(data).hexdigest()
    copy, name = f"{path.stem}-{sha256[:12]}{path.suffix}", ""
    for known, files in VOCABULARY_FILES.items():
        if [*files.values()] == [sha256]:
            (file,), name = files, known
            copy = _kept_as(file)
            break
    kept = vocabulary_folder() / copy
    if not kept.exists() or kept.read_bytes() != data:
        if not name:
            _read_file(copy, path)  # a damaged one isn't kept
        vocabulary_folder().mkdir(parents=True, exist_ok=True)
        with atomic_write(kept) as f:
            f.write(data)
    return name or copy


def _encoding_of(path: Path) -> tiktoken.Encoding:
    """Of a .tiktoken file that is none of OpenAI's: with GPT-2's pattern, and an end of text as
    its last id."""
    ranks = {}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            piece, rank = line.split()
            ranks[base64.b64decode(piece, validate=True)] = int(rank)
        except ValueError:
            raise ValueError(f"{path}, line {number}: not a piece in base64 and its rank") from None
    if not {bytes([i]) for i in range(256)} <= ranks.keys():
        raise ValueError(f"{path} is no vocabulary: it hasn't got all 256 bytes")
    if len({*ranks.values()}) < len(ranks) or min(ranks.values()) < 0:
        raise ValueError(f"{path} is no vocabulary: two pieces have one rank, or one is below 0")
    if max(ranks.values()) > 2 * len(ranks):
        raise ValueError(f"{path} is no vocabulary: most of its ranks have no piece")
    return tiktoken.Encoding(
        path.stem,
        pat_str=tiktoken_ext.openai_public.r50k_pat_str,
        mergeable_ranks=ranks,
        special_tokens={"<|endoftext|>": max(ranks.values()) + 1},
    )
