"""Prepared tokens to batches of (x, y).

    python dataset.py                       # what the corpus prepared last gives
    python dataset.py tinyshakespeare
    python dataset.py wikitext-2 --split val --sequence_length 256

    train_loader, val_loader = create_dataloaders("data/tinyshakespeare", 256, batch_size=32)
    x, y = next(iter(train_loader))    # (32, 256) int64 each

y is x shifted by one: y[b, t] is the token that follows x[b, t]. The command prints the first rows
of a batch as text, checks this shift, and counts for each form of batch the tokens that are trained
on, padded and left out. ║ separates documents, ░ is padding.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike, DTypeLike
from torch.utils.data import BatchSampler, DataLoader, Dataset

from batches.collate import collate_documents, collate_huggingface
from batches.documents import (
    DocumentDataset,
    document_ids,
    document_mask,
    document_positions,
    pad_documents,
)
from batches.mixture import ConcatTextDataset, MixtureBatches, MixtureOrder
from batches.noise import NoisyTextDataset, add_token_noise
from batches.order import (
    ShuffledBatches,
    ShuffledIndices,
    ShuffledOrder,
    SimilarLengthBatches,
    check_rank,
)
from batches.packing import PackedDocuments, pack_documents
from batches.preview import print_counts, print_documents, print_windows
from batches.streaming import StreamingTextDataset, tokenize
from batches.tokens import Tokens, check_split_size
from common.script import run_script
from common.settings import check_ranges, parse_settings
from corpus.metadata import newest_corpus, read_metadata
from corpus.vocabulary import check_one_vocabulary, tokenizer_of

__all__ = [
    "ConcatTextDataset", "DocumentDataset", "MixtureBatches", "MixtureOrder", "NoisyTextDataset",
    "PackedDocuments", "ShuffledBatches", "ShuffledIndices", "ShuffledOrder",
    "SimilarLengthBatches", "StreamingTextDataset", "TextDataset", "Tokens", "add_token_noise",
    "collate_documents", "collate_huggingface", "create_dataloaders", "create_mixture_dataloaders",
    "document_ids", "document_mask", "document_positions", "newest_corpus", "pack_documents",
    "pad_documents", "read_metadata", "tokenize",
]  # fmt: skip


@dataclass
class Settings:
    corpus: str = ""  # prepared corpus; "": the one prepared last
    data_dir: str = "data"  # folder of prepared corpora
    split: Literal["train", "val", "test"] = "train"  # split of the corpus
    sequence_length: int = 64  # tokens per row
    batch_size: int = 8  # rows per batch
    rows: int = 3  # rows that are shown as text
    seed: int = 0  # seed of the order of the rows


RANGES = {"sequence_length": (1, 1 << 16), "batch_size": (1, 1 << 12)}
MAX_BATCH_TOKENS = 1 << 24  # 128 MB of int64
MAX_PREVIEW_TOKENS = 100_000_000  # tokens of which the preview shows documents


class TextDataset(Dataset):
    """Windows over one long sequence of tokens, memory-mapped.

    - Item i is a pair (x, y) of (T,) int64 tensors, with T = sequence_length and y = x shifted by
      one token.
    - A list or array of indices gives (B, T) tensors, read in one gather. The fastest way to load
      is a sampler of batches:
      DataLoader(dataset, sampler=ShuffledBatches(len(dataset), 32), batch_size=None).
    - There are as many items as whole windows of T + 1 tokens: n - T for n tokens and stride 1.

    Example: tokens [0, 1, 2, 3, 4, 5, 6], sequence_length 3, stride 2 -> item 0 is
    ([0, 1, 2], [1, 2, 3]), and item 1, the last, is ([2, 3, 4], [3, 4, 5]).

    Args:
        path: A split of a prepared corpus (data/NAME/train); or a bare .bin file, which needs a
            dtype; or a one-dimensional array of ids; or Tokens.
        sequence_length: T, tokens of x and of y.
        stride: Tokens between the starts of neighboring windows. 1 slides by one token;
            sequence_length makes windows whose x do not overlap.
        dtype: Type of the ids of a bare file, "uint16" or "uint32".
        eot_token: Id that ends a document, for a bare file or an array.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: A file does not match metadata.json, or the split is shorter than a window. On
            reading: an id is outside the vocabulary.
        TypeError: On reading, an index is not an integer or a list of integers.
        IndexError: On reading, an index is out of range.
    """

    def __init__(
        self,
        path: str | Path | ArrayLike | Tokens,
        sequence_length: int,
        stride: int = 1,
        dtype: DTypeLike | None = None,
        eot_token: int | None = None,
    ):
        if sequence_length < 1 or stride < 1:
            raise ValueError(
                f"sequence_length ({sequence_length}) and stride ({stride}) must be at least 1"
            )
        self.tokens = path if isinstance(path, Tokens) else Tokens(path, dtype, eot_token)
        self.sequence_length = sequence_length
        self.stride = stride
        if len(self.tokens) < sequence_length + 1:
            raise ValueError(
                f"{self.tokens.path} has {len(self.tokens):,} tokens, fewer than one window of "
                f"{sequence_length} and the token after it: lower sequence_length, or prepare "
                f"more text"
            )
        self.num_windows = (len(self.tokens) - sequence_length - 1) // stride + 1

    def __len__(self) -> int:
        return self.num_windows

    def __getitem__(self, index: ArrayLike) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (x, y): (T,) tensors for one index, (B, T) tensors for a list of indices."""
        starts = self.window_starts(index)
        ids = self.tokens.gather(starts.reshape(-1), self.sequence_length + 1)
        # x and y are contiguous copies: a view could not be copied to a GPU without waiting.
        x = torch.from_numpy(ids[:, :-1].astype(np.int64))
        y = torch.from_numpy(ids[:, 1:].astype(np.int64))
        if starts.ndim == 0:
            return x[0], y[0]
        return x, y

    def __getitems__(self, indices: list[int]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Return the (x, y) of each index, read in one gather; DataLoader calls this method."""
        x, y = self[indices]
        return list(zip(x, y))

    def window_starts(self, index: ArrayLike) -> np.ndarray:
        """Return the position of each window's first token, int64, in the shape of `index`.

        Example: with stride 2 and 5 windows, [0, 3, -1] -> [0, 6, 8].

        Args:
            index: One index or a list of indices; a negative index counts from the end.

        Raises:
            TypeError: An index is not an integer or a list of integers.
            IndexError: An index is out of range.
        """
        indices = np.asarray(index)
        if indices.dtype.kind not in "iu" and indices.size:
            raise TypeError(f"an index must be an integer or a list of integers, not {index!r:.60}")
        if indices.ndim > 1:
            raise TypeError(f"indices must be one list, not an array of shape {indices.shape}")
        indices = indices.astype(np.int64, copy=False)
        # One comparison finds both the negative and the too large indices: read as an unsigned
        # integer, a negative index is larger than any number of windows.
        if indices.view(np.uint64).max(initial=0) >= self.num_windows:
            outside = indices[(indices < -self.num_windows) | (indices >= self.num_windows)]
            if outside.size:
                raise IndexError(
                    f"window {outside.flat[0]} is out of range: {self.tokens.path} has "
                    f"{self.num_windows:,}"
                )
            indices = indices % self.num_windows
        return indices * self.stride

    @property
    def vocab_size(self) -> int | None:
        """Number that all ids are below; None: unknown, as for a bare file."""
        return self.tokens.vocab_size

    def num_tokens(self) -> int:
        """Return the number of tokens of the split."""
        return len(self.tokens)

    def num_documents(self) -> int:
        """Return the number of documents of the split.

        Raises:
            ValueError: The documents have to be counted, and eot_token is unknown or the ids are a
                running text.
        """
        return self.tokens.num_documents()

    def num_files(self) -> int:
        """Return the number of shards (.bin files) of the split."""
        return len(self.tokens.shards)

    def count_tokens(self) -> dict[str, int]:
        """Return how many tokens are "trained" on and "left_out".

        The two numbers add up to the tokens of the split. A token is trained on if it is a target
        in a window. The first token is left out, and so are tokens that are in no window.

        Example: 10 tokens, sequence_length 4, stride 4 -> {"trained": 8, "left_out": 2}.
        """
        # Each window after the first adds this many targets.
        new_targets = min(self.stride, self.sequence_length)
        trained = self.sequence_length + new_targets * (len(self) - 1)
        return {"trained": trained, "left_out": len(self.tokens) - trained}

    def split(self, size: float | int) -> tuple["TextDataset", "TextDataset"]:
        """Divide the tokens into two views that share no token: (first, last).

        Example: 100 tokens without documents, split(0.1) -> views of 90 and 10 tokens.

        Args:
            size: Size of `last`. A number between 0 and 1 is a share of the tokens, rounded so that
                `last` begins with a document if there are documents. A whole number is a number of
                windows.

        Returns:
            Two datasets, (first, last).

        Raises:
            ValueError: A view would be shorter than a window.
        """
        check_split_size(size)
        n = len(self.tokens)
        if size < 1:
            middle = self.tokens.document_end(n - round(n * size))
        else:
            middle = n - (int(size) - 1) * self.stride - self.sequence_length - 1
        if not 0 < middle < n:
            raise ValueError(f"{self.tokens.path} can't be split by {size}: it has {n:,} tokens")
        first = self.tokens.view(0, middle)
        last = self.tokens.view(middle, n)
        return (
            TextDataset(first, self.sequence_length, self.stride),
            TextDataset(last, self.sequence_length, self.stride),
        )


def create_dataloaders(
    corpus_dir: str | Path,
    sequence_length: int,
    batch_size: int = 32,
    seed: int = 0,
    num_workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
    *,
    token_noise: float = 0.0,
) -> tuple[DataLoader, DataLoader]:
    """Return (train_loader, val_loader) over a prepared corpus.

    - Both loaders yield [x, y], (B, T) int64 each.
    - Training: whole batches in shuffled order. A pass over the loader reads every token once,
      except tokens that fill no whole window or batch. Each pass divides the text into other
      windows. To resume, set train_loader.sampler.position (see ShuffledBatches).
    - Validation: windows in order, with a stride of sequence_length. Each window comes once over
      all ranks. The last batch may be smaller, and a rank has no batch if there are fewer windows
      than ranks.

    Args:
        corpus_dir: Folder of the corpus (data/NAME).
        sequence_length: T, tokens per sequence.
        batch_size: Sequences per batch, over all ranks.
        seed: Seed of order and noise.
        num_workers: Worker processes of each loader. Workers help with slow disks only: reading
            memory-mapped files is faster without them.
        rank: Number of this process.
        world_size: Number of processes.
        token_noise: Share of the input tokens replaced by random ones (see add_token_noise).

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: A file or an argument is invalid; see TextDataset and ShuffledBatches.
    """
    train_loader, (val_loader,) = create_mixture_dataloaders(
        {corpus_dir: 1}, sequence_length, batch_size, seed, num_workers, rank, world_size,
        token_noise=token_noise,
    )  # fmt: skip
    return train_loader, val_loader


def create_mixture_dataloaders(
    corpora: Mapping[str | Path, float | Fraction],
    sequence_length: int,
    batch_size: int = 32,
    seed: int = 0,
    num_workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
    *,
    token_noise: float = 0.0,
) -> tuple[DataLoader, list[DataLoader]]:
    """Return (train_loader, val_loaders) over several prepared corpora of one vocabulary.

    - Training: whole batches, in which each corpus has its share of the sequences, and so of the
      tokens (see MixtureOrder). The sequences of a corpus come in the order in which
      create_dataloaders yields them.
    - Validation: a loader per corpus, as create_dataloaders returns it.

    Args:
        corpora: Folder of a corpus (data/NAME) -> its weight, see proportions (batches/mixture.py).
        sequence_length: As for create_dataloaders, and so are all other arguments.
        batch_size: Sequences per batch, over all corpora and ranks.
        seed: Seed of order and noise.
        num_workers: Worker processes of each loader.
        rank: Number of this process.
        world_size: Number of processes.
        token_noise: Share of the input tokens replaced by random ones.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: A file or an argument is invalid (see TextDataset and MixtureBatches), or the
            corpora have different vocabularies.
    """
    check_rank(rank, world_size)
    if len(corpora) > 1:
        check_one_vocabulary({folder: read_metadata(folder) for folder in corpora})
    T = sequence_length
    train = [TextDataset(Path(corpus_dir) / "train", T) for corpus_dir in corpora]
    val = [TextDataset(Path(corpus_dir) / "val", T, stride=T) for corpus_dir in corpora]
    weights = list(corpora.values())
    train_order = MixtureBatches(
        [len(data) for data in train], weights, batch_size, seed, T, rank, world_size
    )
    train_data: list[Dataset] = list(train)
    if token_noise:
        train_data = [NoisyTextDataset(data, token_noise, seed) for data in train]
    mixture = ConcatTextDataset(train_data) if len(train_data) > 1 else train_data[0]
    options: dict[str, Any] = {
        "batch_size": None,  # the samplers give whole batches of indices
        "collate_fn": list,  # [x, y], as a DataLoader with a batch_size yields it
        "num_workers": num_workers,
        "persistent_workers": num_workers > 0,
    }
    train_loader = DataLoader(mixture, sampler=train_order, **options)
    val_loaders = []
    for data in val:
        val_indices = range(rank, len(data), world_size)
        val_order = BatchSampler(val_indices, train_order.rank_batch_size, drop_last=False)
        val_loaders.append(DataLoader(data, sampler=val_order, **options))
    return train_loader, val_loaders


def main() -> None:
    """Preview a prepared corpus: python dataset.py NAME."""
    if len(sys.argv) > 1 and not sys.argv[1].startswith("-"):
        sys.argv.insert(1, "--corpus")
    settings = parse_settings(Settings, __doc__)
    check_ranges(settings, RANGES)
    if settings.batch_size * settings.sequence_length > MAX_BATCH_TOKENS:
        raise ValueError(
            f"a batch of {settings.batch_size} x {settings.sequence_length} tokens is too large "
            f"for a preview: lower --batch_size or --sequence_length"
        )
    name = settings.corpus or newest_corpus(settings.data_dir).name
    folder = Path(settings.data_dir) / name
    metadata = read_metadata(folder)
    tokenizer = tokenizer_of(metadata, folder)
    print_counts(folder, metadata)
    tokens = Tokens(folder / settings.split)
    windows = TextDataset(tokens, settings.sequence_length)
    order = ShuffledBatches(
        len(windows), settings.batch_size, settings.seed, settings.sequence_length
    )
    print_windows(windows, order, tokenizer, settings.rows)
    if metadata.get("eot_per_document", False):
        beginning = tokens.view(0, min(len(tokens), MAX_PREVIEW_TOKENS))
        documents = DocumentDataset(beginning)
        print_documents(
            documents,
            settings.sequence_length,
            settings.batch_size,
            settings.seed,
            tokenizer,
            settings.rows,
        )


if __name__ == "__main__":
    run_script(main)
