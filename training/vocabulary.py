"""Whether weights have the vocabulary of a corpus, and the tokenizer of a folder of weights."""

import sys
import tempfile
from pathlib import Path

from common.packages import optional
from corpus.tokenizer import HuggingFaceTokenizer, Tokenizer, get_tokenizer, vocabulary_digest
from corpus.vocabulary import (
    GPT2_DIGEST,
    first_difference,
    read_vocabulary,
    tokenizer_of,
    vocabulary_of,
)
from corpus.vocabulary_files import fetch_vocabulary
from training.distributed import is_first_rank
from training.huggingface import is_released


def check_vocabulary(init_from: str, folder: Path, corpus: str, metadata: dict) -> None:
    """Check that a corpus has the vocabulary of weights in the Hugging Face layout.

    Where there is nothing to compare, one line on standard error says what is assumed.

    Args:
        init_from: Name or folder of the weights.
        folder: Folder of the weights, from pretrained_folder.
        corpus: Name of the corpus.
        metadata: Metadata of the corpus.

    Raises:
        ValueError: An id of the corpus stands for other bytes in the weights' vocabulary, or a
            vocabulary is damaged.
        OSError: A file cannot be read.
    """
    name = metadata["tokenizer"]["name"]
    wanted = read_vocabulary(folder)
    if wanted is None and not is_released(init_from):
        _say(f"{init_from} has no vocabulary: assuming that of the corpus {corpus} ({name})")
        return
    has_gpt2 = wanted is None or vocabulary_digest(wanted) == GPT2_DIGEST
    if has_gpt2 and metadata["tokenizer"]["sha256"] == GPT2_DIGEST:
        return
    try:
        found = vocabulary_of(tokenizer_of(metadata, corpus))
    except FileNotFoundError:
        _say(
            f"the vocabulary of the corpus {corpus} ({name}) is not on this machine: assuming that "
            f"it is the vocabulary of {init_from}"
        )
        return
    if wanted is None:
        if vocabulary_digest(found) == GPT2_DIGEST:
            return
        example = "it is GPT-2's"
    else:
        i = first_difference(found, wanted)
        if i is None:
            return
        example = f"id {i} stands for {wanted.get(i, b'')!r:.40} there, for {found[i]!r:.40} here"
    raise ValueError(
        f"{corpus} ({name}) has another vocabulary than {init_from} ({example}): prepare the "
        f"corpus with the vocabulary of those weights"
    )


def _say(line: str) -> None:
    if is_first_rank():
        print(line, file=sys.stderr, flush=True)


def tokenizer_of_weights(init_from: str, folder: Path) -> Tokenizer:
    """Return the tokenizer of a folder of weights in the Hugging Face layout.

    The tokenizer is that of the folder's tokenizer.json, or of its vocab.json and merges.txt. A
    folder without these files has GPT-2's, as OpenAI's weights do; for other weights, one line on
    standard error says so.

    Args:
        init_from: Name or folder of the weights.
        folder: Folder of the weights, from pretrained_folder.

    Raises:
        ValueError: A file is damaged, or the folder has only a part of a vocabulary.
        ConnectionError: GPT-2's vocabulary cannot be downloaded.
        OSError: A file cannot be read.
    """
    if (folder / "tokenizer.json").exists():
        return HuggingFaceTokenizer(folder.name, folder / "tokenizer.json")
    vocabulary = read_vocabulary(folder)
    if vocabulary is not None and vocabulary_digest(vocabulary) != GPT2_DIGEST:
        return _read_vocab_and_merges(folder)
    if vocabulary is None and not is_released(init_from):
        _say(f"{init_from} has no vocabulary: assuming GPT-2's")
    fetch_vocabulary("gpt2")
    return get_tokenizer("gpt2")


def _read_vocab_and_merges(folder: Path) -> Tokenizer:
    """Return the tokenizer of vocab.json and merges.txt, which divides text as GPT-2's does."""
    tokenizers = optional("tokenizers", str(folder / "vocab.json"))
    files = [folder / "vocab.json", folder / "merges.txt"]
    if not files[1].exists():
        raise ValueError(f"{folder} has vocab.json without merges.txt: add that file")
    try:
        model = tokenizers.models.BPE.from_file(*map(str, files))
    except Exception as error:  # the package raises no narrower type
        raise ValueError(f"{folder} has a damaged vocab.json or merges.txt: {error}") from None
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    eot_texts = [
        text for text in HuggingFaceTokenizer.EOT_TEXTS if model.token_to_id(text) is not None
    ]
    tokenizer.add_special_tokens(eot_texts)
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "tokenizer.json"
        tokenizer.save(str(path))
        return HuggingFaceTokenizer(folder.name, path)
