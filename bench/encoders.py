"""Compare the fast encoder with tiktoken, for GPT-2's vocabulary.

python -m bench.encoders documents 1000000    # so many random documents: the same ids?
python -m bench.encoders unicode              # every code point in many contexts: the same ids?
python -m bench.encoders memory 1000          # peak memory over so many MB of distinct words
python -m bench.encoders memory 75 5 12 60 250 2000    # of words of these lengths in turns
python -m bench.encoders corpus 5000 1    # peak memory of prepare_data.py over such words, 1 worker

Needs pip install fastokens, in the version that corpus/encoders.py names. The first two end with an
error at the first difference.
"""

import json
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from common.script import run_script
from corpus.encoders import FAST, FastEncoder, open_encoder
from corpus.tokenizer import Tokenizer, get_tokenizer

CONTEXTS = (  # of a code point, in place of the @
    "@", "@@", "a@", "@a", "a@a", "1@", "@1", "1@1", "@'ll", "@'s", "@'d", "'@", "a'@", "'l@", " @",
    "@ ", " @ a", "  @", "@  a", "\n@\n", "@\n\n@", ".@", "@.", ".@.", "\xe9@", "\u6f22@\u6f22",
)  # fmt: skip
BLOCK_CODE_POINTS = 2048  # compared in one call
BATCH_DOCUMENTS = 1000  # compared in one call
FRAGMENTS = (
    "a", "Z", "the", " of", "hello", "ing", "'ll", "'s", "'d", "'ve", "'LL", "'", "\u2019s", "0",
    "42", "1234567", " ", "  ", "   ", "\n", "\r\n", "\n\n", "\t", "\x00", "\x1c", "\x85", "\xa0",
    "\u180e", "\u200b", "\u200d", "\u2028", "\u3000", "\ufeff", ".", "!!!", "--", "\xbd", "\u0661",
    "\xe9", "e\u0301", "\u6f22", "\u0e01\u0e33", "\U0001f600", "\U0001f469\u200d\U0001f4bb",
    "<|endoftext|>", "<|endof", "text|>", "\ud83d", "\ude00", "\U00011db2", "\u088f",
)  # fmt: skip


def main() -> None:
    commands = {
        "documents": compare_documents,
        "unicode": compare_unicode,
        "memory": fill_memory,
        "corpus": prepare_corpus,
    }
    arguments = [int(argument) for argument in sys.argv[2:] if argument.isdigit()]
    if len(sys.argv) < 2 or sys.argv[1] not in commands or len(arguments) < len(sys.argv[2:]):
        raise ValueError("name a comparison, as in python -m bench.encoders documents 1000000")
    began = time.perf_counter()
    print(commands[sys.argv[1]](*arguments), f"in {time.perf_counter() - began:.0f} s")


def compare_documents(
    count: int = 1_000_000, seed: int = 0, tokenizer: Tokenizer | None = None
) -> str:
    """Compare the ids of `count` random documents, with GPT-2's vocabulary by default."""
    tokenizer = tokenizer or get_tokenizer("gpt2")
    encoder = open_encoder(FAST, tokenizer)
    for number in range(0, count, BATCH_DOCUMENTS):
        generator = random.Random(f"{seed}/{number}")
        texts = [random_document(generator) for _ in range(min(BATCH_DOCUMENTS, count - number))]
        refuse_difference(tokenizer, encoder, texts)
    return f"{count:,} documents: the same ids"


def random_document(generator: random.Random) -> str:
    """Return a document of up to forty fragments and code points."""
    parts = []
    for _ in range(generator.randrange(40)):
        kind = generator.random()
        if kind < 0.7:
            parts.append(generator.choice(FRAGMENTS))
        elif kind < 0.72:
            parts.append(generator.choice(FRAGMENTS) * generator.randrange(300))
        else:
            stop = generator.choice((0x80, 0x800, 0x10000, 0x20000, 0x110000))
            parts.append(chr(generator.randrange(stop)))
    return "".join(parts)


def compare_unicode() -> str:
    """Compare the ids of every code point in every context."""
    tokenizer = get_tokenizer("gpt2")
    encoder = open_encoder(FAST, tokenizer)
    count = 0
    for code_points in blocks_of_code_points():
        texts = [context.replace("@", chr(c)) for c in code_points for context in CONTEXTS]
        refuse_difference(tokenizer, encoder, texts)
        count += len(code_points)
    return f"{count:,} code points in {len(CONTEXTS)} contexts: the same ids"


def blocks_of_code_points() -> Iterator[list[int]]:
    """Yield all code points, without surrogates, in blocks."""
    for start in range(0, 0x110000, BLOCK_CODE_POINTS):
        if not 0xD800 <= start < 0xE000:
            yield list(range(start, start + BLOCK_CODE_POINTS))


def refuse_difference(tokenizer: Tokenizer, encoder: FastEncoder, texts: list[str]) -> None:
    """Raise ValueError with a text for which the ids differ."""
    if np.array_equal(encoder.encode_documents(texts), tokenizer.encode_documents(texts)):
        return
    for text in texts:
        if not np.array_equal(encoder.encode(text), tokenizer.encode(text)):
            raise ValueError(f"the ids of {text!a} differ")
    raise ValueError(f"the ids of {texts!a} differ, though not those of each alone")


def fill_memory(megabytes: int = 1000, *word_lengths: int) -> str:
    """Encode documents of random words, nearly all of them distinct.

    Args:
        megabytes: Size of all documents.
        word_lengths: Characters of a word, on average: another length for each megabyte in turns.
    """
    word_lengths = word_lengths or (5,)
    encoder = open_encoder(FAST, get_tokenizer("gpt2"))
    generator = np.random.default_rng(0)
    peaks = []
    for number in range(megabytes):
        word_length = word_lengths[number % len(word_lengths)]
        encoder.encode_documents(distinct_documents(generator, word_length))
        status = Path("/proc/self/status").read_text()  # ru_maxrss may be that of the parent
        peaks.append(int(status.partition("VmHWM:")[2].split()[0]) / 1024)
    half = peaks[len(peaks) // 2]
    return (
        f"{megabytes} MB of distinct words: {peaks[-1]:.0f} MiB at the peak, "
        f"{half:.0f} in the first half"
    )


def prepare_corpus(megabytes: int = 5000, workers: int = 1) -> str:
    """Prepare a .jsonl of documents of random words, nearly all of them distinct.

    Args:
        megabytes: Size of all documents.
        workers: Processes of prepare_data.py.
    """
    from bench.report import ROOT, as_flags, whole_process  # not above: torch needs memory

    generator = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        corpus = f"{folder}/corpus.jsonl"
        with open(corpus, "w") as f:
            for _ in range(megabytes):
                for document in distinct_documents(generator, word_length=5):
                    f.write(json.dumps({"text": document}) + "\n")
        flags = {"input": corpus, "data_dir": folder, "tokenizer": "gpt2", "workers": workers}
        command = [sys.executable, ROOT / "prepare_data.py", *as_flags(flags)]
        seconds, mib, _ = whole_process(command, cwd=ROOT)
    return (
        f"{megabytes} MB of distinct words, {workers} workers: {mib:.0f} MiB in the largest "
        f"process, {megabytes / seconds:.1f} MB/s"
    )


def distinct_documents(generator: np.random.Generator, word_length: int) -> list[str]:
    """Return a megabyte of documents of random words, of `word_length` letters on average."""
    letters = np.frombuffer(b"abcdefghijklmnopqrstuvwxyz", np.uint8)
    characters = letters[generator.integers(0, len(letters), 1_000_000)]
    characters[generator.integers(0, 1_000_000, 1_000_000 // word_length)] = ord(" ")
    text = characters.tobytes().decode()
    size = max(150, 2 * word_length)
    return [text[i : i + size] for i in range(0, len(text), size)]


if __name__ == "__main__":
    run_script(main)
