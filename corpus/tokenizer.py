"""Text to token ids and back, by GPT-2's vocabulary, another one of tiktoken's, or plain bytes.

    tokenizer = get_tokenizer("gpt2")
    ids = tokenizer.encode("To be, or not to be")      # (6,) uint32
    tokenizer.decode(ids)                              # the same text

A tokenizer is identified by its name and the sha256 of its vocabulary.
"""

import base64
import codecs
import contextlib
import functools
import hashlib
import itertools
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import tiktoken
import tiktoken_ext.openai_public

from common.files import atomic_write
from common.grouping import in_groups
from common.packages import optional
from corpus.boundaries import BOUNDARY
from corpus.divisible import is_divisible
from corpus.download import sha256_of
from corpus.gpt2_encoding import gpt2_encoding
from corpus.json_encoding import json_encoding
from corpus.vocabulary_files import (
    VOCABULARY_FILES,
    bpe_size,
    cache_name,
    full_name,
    is_file_name,
    missing_files,
    vocabulary_folder,
    vocabulary_paths,
)

LONGEST_SPACE = 1_000_000  # characters of white space that tiktoken's patterns can match
CHARACTERS_AT_ONCE = 1 << 17  # of a tokenizer.json, which needs 120 bytes of memory for each
BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")  # a byte of a character outside the vocabulary
LONG_SPACE = re.compile(rf"\s{{{LONGEST_SPACE},}}")


class CannotEncode(ValueError):
    """A tokenizer cannot encode a text.

    Attributes:
        offset: Number of characters before the fault, or 0 if the place is unknown.
    """

    def __init__(self, reason: str, offset: int = 0):
        super().__init__(reason)
        self.offset = offset


class Tokenizer:
    """Base class of all tokenizers.

    Attributes:
        name: Name that get_tokenizer takes.
        vocab_size: Number of ids. Every id is below this number.
        eot_token: Id of the end-of-text token. No text is encoded to this id.
        sha256: Hash of the vocabulary. With equal hashes, equal ids mean equal text.
        divisible: Whether a text may be encoded in several calls, with cuts as in boundaries.py.
        lossless: Whether decode_bytes returns exactly the encoded text, also for a part of the ids.
        token_bytes: Id -> bytes that the id stands for.
    """

    name: str
    vocab_size: int
    eot_token: int
    sha256: str
    divisible: bool = True
    lossless: bool = True
    token_bytes: dict[int, bytes]

    def encode(self, text: str) -> np.ndarray:
        """Encode a text.

        Args:
            text: Any text. A literal "<|endoftext|>" is ordinary text.

        Returns:
            (n,) uint32 array of ids.

        Raises:
            CannotEncode: The tokenizer cannot encode the text.
        """
        raise NotImplementedError

    def can_encode(self, text: str) -> bool:
        """Return whether `encode` can encode the text."""
        try:
            self.encode(text)
        except CannotEncode:
            return False
        return True

    @property
    def dtype(self) -> np.dtype:
        """Little-endian dtype of ids on disk: uint16 if all ids fit, else uint32."""
        return np.dtype("<u2" if self.vocab_size <= 1 << 16 else "<u4")

    def encode_documents(self, texts: Iterable[str]) -> np.ndarray:
        """Encode texts, each followed by the end-of-text token.

        Args:
            texts: Texts, one per document.

        Returns:
            (n,) uint32 array of ids.

        Raises:
            CannotEncode: The tokenizer cannot encode one of the texts.
        """
        end = np.array([self.eot_token], np.uint32)
        arrays = [np.empty(0, np.uint32)]
        for text in texts:
            arrays += [self.encode(text), end]
        return np.concatenate(arrays)

    def num_bytes_of_beginning(self, text: str, ids: np.ndarray) -> int:
        """Return how many UTF-8 bytes of a text its first ids stand for.

        Example: with GPT-2's vocabulary, "one for sorrow" begins with the ids of "one" and " for",
        which stand for 7 bytes.

        Args:
            text: Any text.
            ids: (n,) array, the first ids of the text, but not all of them; at least one.

        Raises:
            CannotEncode: The tokenizer cannot encode the text.
        """
        return len(self.decode_bytes(ids))

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Return the UTF-8 bytes of ids, which may begin or end inside a character.

        An id that stands for nothing becomes U+FFFD: an untrained model may choose it.
        """
        unknown = "\ufffd".encode()
        return b"".join([self.token_bytes.get(i, unknown) for i in map(int, ids)])

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids; bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode(errors="replace")

    def decode_stream(self, ids: Iterable[int]) -> Iterator[str]:
        """Yield the text of ids as it comes, in whole characters.

        A character that the last id leaves incomplete is not shown.
        """
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        for i in ids:
            yield decoder.decode(self.decode_bytes([i]))


class BytesTokenizer(Tokenizer):
    """256 bytes and an end-of-text token: no download, and fast learning on small corpora."""

    name = "bytes"
    vocab_size = 257
    eot_token = 256
    sha256 = hashlib.sha256(bytes(range(256))).hexdigest()
    token_bytes = {i: bytes([i]) for i in range(256)} | {256: b"<|endoftext|>"}

    def encode(self, text: str) -> np.ndarray:
        """Return the bytes of a text, as (n,) uint32 ids."""
        return np.frombuffer(encodable(text).encode(), np.uint8).astype(np.uint32)


class TiktokenTokenizer(Tokenizer):
    """An encoding of tiktoken.

    Args:
        name: Name that get_tokenizer takes.
        encoding: Encoding that tiktoken returned.
    """

    def __init__(self, name: str, encoding: tiktoken.Encoding):
        self.name = name
        self.encoding = encoding
        self.vocab_size = encoding.n_vocab
        self.eot_token = encoding.eot_token
        self.eot_text = encoding.decode([self.eot_token])
        special = {name.encode(): i for name, i in encoding._special_tokens.items()}
        ids = (encoding._mergeable_ranks | special).items()
        self.token_bytes = dict(sorted((i, token) for token, i in ids))
        self.sha256 = vocabulary_digest(self.token_bytes)

    def encode(self, text: str) -> np.ndarray:
        """Encode a text.

        Returns:
            (n,) uint32 array of ids.

        Raises:
            CannotEncode: The text has a million white-space characters in a row.
        """
        return self._encode(text, with_eot=False)

    def can_encode(self, text: str) -> bool:
        """Return whether `encode` can encode the text. A short text is not tried."""
        return len(text) < LONGEST_SPACE or super().can_encode(text)

    def encode_documents(self, texts: Iterable[str]) -> np.ndarray:
        """Encode texts, each followed by the end-of-text token; see encode_joined."""
        return encode_joined(texts, self.eot_text, self.eot_token, self._encode)

    def _encode(self, text: str, with_eot: bool) -> np.ndarray:
        """Return the ids of a text, in which a literal end of text is the token or ordinary."""
        text = encodable(text)
        allowed_special = {self.eot_text} if with_eot else set()
        try:
            return self.encoding.encode_to_numpy(
                text, allowed_special=allowed_special, disallowed_special=()
            )
        except ValueError as error:  # from tiktoken's regular expression
            long_space = LONG_SPACE.search(text)
            if long_space is None:
                raise CannotEncode(f"{self.name} cannot encode it: {error}") from None
            raise CannotEncode(
                f"{self.name} cannot encode a run of {len(long_space[0]):,} white-space characters",
                long_space.start(),
            ) from None


def encode_joined(
    texts: Iterable[str],
    eot_text: str,
    eot_token: int,
    encode: Callable[[str, bool], np.ndarray],
) -> np.ndarray:
    """Encode many documents in one call, because a call costs as much as ten short documents.

    Args:
        texts: Texts, one per document.
        eot_text: Text of the end-of-text token.
        eot_token: Id of the end-of-text token.
        encode: Function (text, with_eot) -> ids. If with_eot, each end of text in the text becomes
            the token; otherwise it is ordinary text.

    Returns:
        (n,) uint32 array of ids, with the end-of-text token after each text.
    """
    texts = list(texts)
    joined = eot_text.join([*texts, ""])
    if joined.count(eot_text) == len(texts):  # no text holds the literal end of text
        return encode(joined, True)
    end = np.array([eot_token], np.uint32)
    arrays = []
    for has_eot, group in itertools.groupby(texts, key=lambda text: eot_text in text):
        if has_eot:  # the literal must not end a document, so one call per text
            for text in group:
                arrays += [encode(text, False), end]
        else:
            arrays.append(encode(eot_text.join([*group, ""]), True))
    return np.concatenate(arrays)


class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer.json, which the `tokenizers` package reads.

    Args:
        name: Name that get_tokenizer takes.
        path: Path of the file.

    Attributes:
        faster: Tokenizer of tiktoken that encodes the texts, because it gives the same ids
            (json_encoding.py), or None.

    Raises:
        ValueError: The file is damaged or has no end-of-text token, or the package is missing.
    """

    lossless = False
    EOT_TEXTS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>", "[SEP]")

    def __init__(self, name: str, path: Path):
        tokenizers = optional("tokenizers", str(path))
        try:
            self.tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the package raises no narrower type
            raise ValueError(f"{path} is not a tokenizer.json: {error}") from None
        self.tokenizer.encode_special_tokens = True  # their literal text is ordinary text
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.name = name
        self.sha256 = sha256_of(path)
        ids = self.tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(ids.values(), default=0) + 1
        if self.vocab_size > 2 * len(ids) + 1:
            raise ValueError(f"{path} is not a vocabulary: most of its ids stand for nothing")
        self.divisible = is_divisible(json.loads(self.tokenizer.to_str()))
        eot_text = next((text for text in self.EOT_TEXTS if text in ids), None)
        if eot_text is None:
            raise ValueError(
                f"{path} has no end-of-text token: it needs one of {', '.join(self.EOT_TEXTS)}"
            )
        self.eot_token = ids[eot_text]
        if self.eot_token in self._encode([eot_text])[0].ids:
            raise ValueError(
                f"{path}: {eot_text} is not a special token there, so any text may hold it; mark "
                f"it as special"
            )
        encoding = json_encoding(self.tokenizer)
        self.faster = TiktokenTokenizer(name, encoding) if encoding else None

    def _encode(self, texts: Iterable[str]) -> list:
        try:
            texts = [encodable(text) for text in texts]
            return self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        except Exception as error:  # the package raises no narrower type
            raise CannotEncode(f"{self.name} cannot encode every text: {error}") from None

    def encode(self, text: str) -> np.ndarray:
        """Return (n,) uint32 ids, from parts of the text if they give the same ids."""
        if self.faster:
            with contextlib.suppress(CannotEncode):  # `tokenizers` encodes any white space
                return self.faster.encode(text)
        calls = in_groups(self._parts(text), CHARACTERS_AT_ONCE, len)
        ids = [np.array(e.ids, np.uint32) for call in calls for e in self._encode(call)]
        return np.concatenate([np.empty(0, np.uint32), *ids])

    def encode_documents(self, texts: Iterable[str]) -> np.ndarray:
        """Encode texts, many short ones in one call, each followed by the end-of-text token."""
        if self.faster:
            texts = list(texts)
            with contextlib.suppress(CannotEncode):
                return self.faster.encode_documents(texts)
        end = np.array([self.eot_token], np.uint32)
        ids = [np.empty(0, np.uint32)]
        for call in in_groups(texts, CHARACTERS_AT_ONCE, len):
            if len(call) == 1:
                ids += [self.encode(call[0]), end]
                continue
            for encoding in self._encode(call):
                ids += [np.array(encoding.ids, np.uint32), end]
        return np.concatenate(ids)

    def _parts(self, text: str) -> Iterable[str]:
        """Return the text in parts of about CHARACTERS_AT_ONCE, if it may be divided."""
        text = encodable(text)
        return divided(text) if self.divisible else [text]

    def num_bytes_of_beginning(self, text: str, ids: np.ndarray) -> int:
        """Return how many UTF-8 bytes of a text its first ids stand for.

        The tokenizer may change the text, so the places of the ids in the original text count. If
        the first ids end inside a character, only the bytes of the next ids are left out.
        """
        text = encodable(text)
        encoding = self._offsets_tokenizer.encode(text, add_special_tokens=False)
        spans = encoding.offsets  # first character of each id, and the one after its last
        if spans[len(ids) - 1][1] <= spans[len(ids)][0]:
            return len(text[: spans[len(ids) - 1][1]].encode())
        stop = len(ids) + 1  # end of the ids that share a character with the one before
        while stop < len(spans) and spans[stop - 1][1] > spans[stop][0]:
            stop += 1
        dropped = sum(map(self._num_bytes_of_token, encoding.tokens[len(ids) : stop]))
        num_bytes = len(text[: spans[stop - 1][1]].encode()) - dropped
        return max(num_bytes, len(text[: spans[len(ids)][0]].encode()))

    @functools.cached_property
    def _offsets_tokenizer(self):
        """The tokenizer without a post-processor, which may cut white space off the offsets."""
        tokenizer = type(self.tokenizer).from_str(self.tokenizer.to_str())
        tokenizer.encode_special_tokens = True
        tokenizer.post_processor = None
        return tokenizer

    @functools.cached_property
    def _is_byte_level(self) -> bool:
        """Whether each character of a token stands for a byte."""
        settings = json.loads(self.tokenizer.to_str())
        return '"ByteLevel"' in json.dumps([settings["pre_tokenizer"], settings["normalizer"]])

    def _num_bytes_of_token(self, token: str) -> int:
        """Return how many bytes a token stands for that shares a character with another token."""
        if BYTE_TOKEN.fullmatch(token):
            return 1
        return len(token) if self._is_byte_level else len(token.encode())

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Return the UTF-8 bytes of the text of ids."""
        return self.tokenizer.decode([int(i) for i in ids], skip_special_tokens=False).encode()

    def decode_stream(self, ids: Iterable[int]) -> Iterator[str]:
        """Yield the text of ids as it comes."""
        from tokenizers.decoders import DecodeStream

        stream = DecodeStream(skip_special_tokens=False)
        for i in ids:
            yield stream.step(self.tokenizer, int(i)) or ""


def divided(text: str) -> Iterator[str]:
    """Yield a text in parts of about CHARACTERS_AT_ONCE, with cuts as in boundaries.py."""
    start = 0
    while len(text) - start > CHARACTERS_AT_ONCE:
        boundary = BOUNDARY.search(text, start + CHARACTERS_AT_ONCE)
        if boundary is None:
            break
        yield text[start : boundary.start()]
        start = boundary.start()
    yield text[start:]


def vocabulary_digest(vocabulary: dict[int, bytes]) -> str:
    """Return the sha256 of a vocabulary: equal for equal ids with equal bytes.

    Args:
        vocabulary: Id -> bytes, in any order.
    """
    lines = [b"%d %s\n" % (i, token.hex().encode()) for i, token in sorted(vocabulary.items())]
    return hashlib.sha256(b"".join(lines)).hexdigest()


def encodable(text: str) -> str:
    """Return the text in valid UTF-8: pairs of surrogates are joined, others become U+FFFD."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def get_tokenizer(name: str) -> Tokenizer:
    """Return a tokenizer.

    Args:
        name: "bytes", "gpt2" or another encoding of tiktoken, "distilgpt2", the path of a Hugging
            Face tokenizer.json or of a .tiktoken file, or the name of a vocabulary that is kept in
            the vocabulary folder ("mine-bpe4096").

    Returns:
        The tokenizer. Its name may differ from the argument.

    Raises:
        ValueError: The name is unknown, or the file is damaged.
        FileNotFoundError: The vocabulary is not on this machine. `python prepare_data.py`
            downloads the vocabulary.
    """
    if is_file_name(name) and Path(name).is_file():
        name = _keep_copy(Path(name))
    name = full_name(name)
    if name == "bytes":
        return BytesTokenizer()
    if bpe_size(name) is not None:
        raise ValueError(
            f"{name} is trained on a corpus: python prepare_data.py --tokenizer {name}"
        )
    return _load(name, vocabulary_folder())


@functools.lru_cache(1)  # forks of this process share the loaded tokenizer
def _load(name: str, folder: Path) -> Tokenizer:
    if missing := missing_files(name):
        url, path, _ = missing[0]
        raise FileNotFoundError(
            f"the vocabulary of {name!r} is not on this machine: {path} is missing or damaged; "
            f"with a network, `python prepare_data.py --tokenizer {name}` downloads it from {url}"
        )
    if is_file_name(name):
        return _read_file(name, folder / name)
    os.environ["TIKTOKEN_CACHE_DIR"] = str(folder)  # where tiktoken looks
    if name == "gpt2":
        return TiktokenTokenizer(name, gpt2_encoding(vocabulary_paths(name)["vocab.bpe"]))
    return TiktokenTokenizer(name, tiktoken.get_encoding(name))


def _read_file(name: str, path: Path) -> Tokenizer:
    if path.suffix == ".json":
        return HuggingFaceTokenizer(name, path)
    return TiktokenTokenizer(name, _read_ranks(path))


def _keep_copy(path: Path) -> str:
    """Copy a tokenizer's file to the vocabulary folder, and return the name of the copy.

    A corpus can then be read without the original file. A copy of a file of OpenAI's gets the name
    of its encoding.
    """
    data = path.read_bytes()
    sha256 = hashlib.sha256(data).hexdigest()
    name = ""
    copy_name = f"{path.stem}-{sha256[:12]}{path.suffix}"
    for encoding, files in VOCABULARY_FILES.items():
        if [*files.values()] == [sha256]:
            name = encoding
            copy_name = cache_name(*files)
            break
    copy = vocabulary_folder() / copy_name
    if not copy.exists() or copy.read_bytes() != data:
        if not name:
            _read_file(copy_name, path)  # a damaged file is not kept
        vocabulary_folder().mkdir(parents=True, exist_ok=True)
        with atomic_write(copy) as f:
            f.write(data)
    return name or copy_name


def _read_ranks(path: Path) -> tiktoken.Encoding:
    """Return the encoding of a .tiktoken file that is not one of OpenAI's.

    The file has neither a pattern nor special tokens. The encoding uses GPT-2's pattern, and its
    last id is the end-of-text token.
    """
    ranks = {}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError:
            raise ValueError(f"{path}, line {number}: not a token in base64 and its rank") from None
    if not {bytes([i]) for i in range(256)} <= ranks.keys():
        raise ValueError(f"{path} is not a vocabulary: it does not have all 256 bytes")
    if len({*ranks.values()}) < len(ranks) or min(ranks.values()) < 0:
        raise ValueError(
            f"{path} is not a vocabulary: two tokens have one rank, or a rank is below 0"
        )
    if max(ranks.values()) > 2 * len(ranks):
        raise ValueError(f"{path} is not a vocabulary: most of its ranks stand for nothing")
    return tiktoken.Encoding(
        path.stem,
        pat_str=tiktoken_ext.openai_public.r50k_pat_str,
        mergeable_ranks=ranks,
        special_tokens={"<|endoftext|>": max(ranks.values()) + 1},
    )
