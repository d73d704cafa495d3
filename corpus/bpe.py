"""A vocabulary of your own: --tokenizer bpe:4096 trains a byte-level BPE on the split for training.

    tokenizer = trained_tokenizer("bpe:4096", corpus, Path("data/mine"))
    tokenizer.name                   # mine-bpe4096-1a2b3c4d5e6f.json, in data/tokenizers/

The vocabulary has exactly as many ids as it is asked for: the 256 bytes in GPT-2's order, then the
merges in the order in which they were learned, and last the end-of-text token. Text is divided by
GPT-2's pattern, so that all rules for GPT-2's vocabulary hold for this one, too.

The name of the file has a hash of all that the vocabulary depends on: the sources with their sizes
and dates, and what decides which text is for training. A file that exists is therefore the one that
training would write, and another text gets another file. No file is ever overwritten.
"""

import contextlib
import itertools
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from tiktoken_ext.openai_public import ENDOFTEXT
from tqdm import tqdm

from common.files import atomic_write
from common.packages import optional
from corpus.download import download_lock
from corpus.existing import refuse_other_files
from corpus.inputs import Corpus
from corpus.metadata import fingerprint
from corpus.pipeline import TASK_BYTES, progress_bar, source_metadata
from corpus.planning import plan
from corpus.reader import read
from corpus.sources import InvalidDocument, Source
from corpus.tasks import SPLIT_RULE, Task, assign_split, skip_or_stop
from corpus.tokenizer import Tokenizer, divided, encodable, get_tokenizer
from corpus.vocabulary_files import bpe_size, vocabulary_folder

TRAINING_RULE = 1  # version of the training, for the hash in the name of the file
SMALLEST_COUNT = 2  # a pair of tokens that comes once in the text is not merged


def trained_tokenizer(
    name: str,
    corpus: Corpus,
    corpus_dir: Path,
    *,
    train_split_ratio: float = 0.9,
    seed: int = 0,
    on_error: str = "stop",
) -> Tokenizer:
    """Return the tokenizer that is trained on the training split of a corpus.

    If its file exists, nothing is trained. If several processes need it, one of them trains it and
    the others wait. The file is the same for any number of threads and processes. Documents count
    whole, whatever max_length is.

    Memory grows with the number of different words of the text, not with its length.

    Args:
        name: "bpe:N", for a vocabulary of N ids.
        corpus: Corpus with its sources.
        corpus_dir: Folder of the corpus, data/NAME. It need not exist.
        train_split_ratio: As for pipeline.prepare.
        seed: As for pipeline.prepare.
        on_error: "stop" or "skip", at an invalid document.

    Returns:
        The tokenizer, whose file is in the vocabulary folder.

    Raises:
        ValueError: A document is invalid, the text has too few pairs for N ids, a source changes
            meanwhile, or the package `tokenizers` is missing.
        OSError: A file cannot be read or written, or corpus_dir was made of other files.
    """
    num_ids = bpe_size(name)
    assert num_ids is not None
    settings = (train_split_ratio, seed)
    refuse_other_files(corpus_dir, {"source": source_metadata(corpus, corpus_dir)})
    key = _key(name, corpus, corpus_dir, *settings)
    path = vocabulary_folder() / f"{corpus.name}-bpe{num_ids}-{key}.json"
    if not path.exists():
        with download_lock(path):  # one process makes the file, the others wait
            if not path.exists():
                start = time.perf_counter()
                data = _train(num_ids, corpus, *settings, on_error).encode()
                if _key(name, corpus, corpus_dir, *settings) != key:
                    raise ValueError(
                        f"the text of {corpus.name} has changed while it was read: run this again"
                    )
                with atomic_write(path) as f:
                    f.write(data)
                seconds = time.perf_counter() - start
                print(f"vocabulary: {num_ids:,} ids trained in {seconds:.1f} s, kept as {path}")
    return get_tokenizer(path.name)


def _key(name: str, corpus: Corpus, corpus_dir: Path, train_split_ratio: float, seed: int) -> str:
    """Return a hash of all that the vocabulary depends on, as 12 hexadecimal digits.

    The hash is the fingerprint of the corpus with "bpe:N" as its tokenizer, because the vocabulary
    does not exist yet.
    """
    num_ids = bpe_size(name)
    metadata = {
        "corpus": corpus.name,
        "source": source_metadata(corpus, corpus_dir),
        "tokenizer": {"name": name, "training_rule": TRAINING_RULE},
        "vocab_size": num_ids,
        "eot_token": -1,
        "eot_per_document": corpus.has_documents,
        "dtype": "",
        "train_split_ratio": train_split_ratio,
        "seed": seed,
        "max_length": 0,
        "split_rule": SPLIT_RULE,
    }
    return fingerprint(metadata, corpus_dir)[:12]


def _train(num_ids: int, corpus: Corpus, train_split_ratio: float, seed: int, on_error: str) -> str:
    """Return the text of the tokenizer.json with `num_ids` ids.

    Raises:
        ValueError: A document is invalid, or the text gives fewer ids.
        OSError: A source cannot be read.
    """
    tokenizers = optional("tokenizers", "--tokenizer bpe:N")
    byte_level = tokenizers.pre_tokenizers.ByteLevel
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = byte_level(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=num_ids - 1,
        min_frequency=SMALLEST_COUNT,
        initial_alphabet=sorted(byte_level.alphabet()),
        show_progress=False,
    )
    # BytesTokenizer: like GPT-2's vocabulary, it encodes a running text in any parts
    tasks = plan(corpus, get_tokenizer("bytes"), train_split_ratio, *TASK_BYTES, on_error)
    with _ended_by_ctrl_c(), progress_bar(tasks, "vocabulary: reading") as progress:
        texts = _training_texts(tasks, corpus, train_split_ratio, seed, on_error, progress)
        tokenizer.train_from_iterator(texts, trainer)
    num_learned = tokenizer.get_vocab_size() + 1
    if num_learned < num_ids:
        raise ValueError(
            f"the training text of {corpus.name} gives only {num_learned:,} ids, because no other "
            f"pair of tokens comes twice: choose --tokenizer bpe:{num_learned} or less, or add text"
        )
    tokenizer.add_special_tokens([ENDOFTEXT])
    return tokenizer.to_str(pretty=True)


@contextlib.contextmanager
def _ended_by_ctrl_c() -> Iterator[None]:
    """Let Ctrl-C end this process at once, as a kill does.

    The package reads the texts in threads of its own, so Python would not raise KeyboardInterrupt
    before the training ends. Nothing is written yet, so nothing is left half-written.
    """
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        yield  # another thread cannot set a handler, and an ignored Ctrl-C stays ignored
        return
    handler = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)


def _training_texts(
    tasks: list[Task],
    corpus: Corpus,
    train_split_ratio: float,
    seed: int,
    on_error: str,
    progress: tqdm,
) -> Iterator[str]:
    """Yield the text of the training split in parts, between which no token is divided."""
    for task in tasks:
        for chunk in task.chunks:
            if chunk.split in ("", "train"):
                for text in _texts_of_chunk(chunk, corpus, train_split_ratio, seed, on_error):
                    yield from divided(encodable(text))
        progress.update(task.num_bytes)
    progress.set_description("vocabulary: merging", refresh=sys.stderr.isatty())


def _texts_of_chunk(
    chunk: Source, corpus: Corpus, train_split_ratio: float, seed: int, on_error: str
) -> Iterator[str]:
    """Yield the texts of a chunk that are for training.

    Raises:
        ValueError: A document is invalid, and it is not to be skipped.
    """
    for positions, texts in read(chunk):
        for text in texts:
            if isinstance(text, InvalidDocument):  # if it is skipped, the tasks will list it
                skip_or_stop(text, corpus.has_documents, on_error)
        masks = assign_split(chunk, positions, train_split_ratio, seed)
        for text in itertools.compress(texts, masks["train"]):
            if isinstance(text, str):
                yield text
