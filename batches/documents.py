"""Whole documents as items, padded to batches, and masks for several documents in one row.

    documents = DocumentDataset("data/wikitext-2/train", max_length=512)
    loader = DataLoader(documents, batch_size=8, collate_fn=pad_documents)

packing.py puts several documents into one row instead of padding each document.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, DTypeLike
from torch.utils.data import Dataset

from batches.tokens import Tokens, check_split_size


def document_ids(tokens: torch.Tensor, eot_token: int) -> torch.Tensor:
    """Return which document of its row each token belongs to.

    An end-of-text token belongs to the document after it, as its first token. So it predicts how
    that document begins, and a model trained on documents can begin one from this token alone.

    Example: tokens=[5, 6, EOT, 7, EOT, 8] -> [0, 0, 1, 1, 2, 2].

    Args:
        tokens: Token ids, (..., T).
        eot_token: Id of the end-of-text token.

    Returns:
        Document ids, (..., T) int64, on the device of `tokens`. They never decrease along a row.
    """
    return (tokens == eot_token).cumsum(-1)


def document_positions(doc_ids: torch.Tensor) -> torch.Tensor:
    """Return each token's position in its document, counted from 0.

    Example: doc_ids=[0, 0, 0, 1, 1, 2] -> [0, 1, 2, 0, 1, 0].

    Args:
        doc_ids: Document ids, (..., T).

    Returns:
        Positions, (..., T) int64, on the device of `doc_ids`.
    """
    positions = torch.arange(doc_ids.shape[-1], device=doc_ids.device).expand_as(doc_ids)
    begins = torch.ones_like(doc_ids, dtype=torch.bool)
    begins[..., 1:] = doc_ids[..., 1:] != doc_ids[..., :-1]
    return positions - torch.where(begins, positions, 0).cummax(-1).values


def document_mask(doc_ids: torch.Tensor) -> torch.Tensor:
    """Return the attention mask that is causal and keeps documents separate.

    A token attends to itself and to earlier tokens of its document.

    Example: doc_ids=[0, 0, 1] -> [[1, 0, 0], [1, 1, 0], [0, 0, 1]].

    Args:
        doc_ids: Document ids, (..., T).

    Returns:
        The mask, (..., T, T) bool, query by key, on the device of `doc_ids`.
    """
    T = doc_ids.shape[-1]
    causal = torch.ones(T, T, dtype=torch.bool, device=doc_ids.device).tril()
    return (doc_ids[..., :, None] == doc_ids[..., None, :]) & causal


class DocumentDataset(Dataset):
    """The documents of a split, each with its end-of-text token: items are (n,) int64 tensors.

    The attribute `lengths` holds the length of each item, (len,) int64.

    Example: ids=[5, 6, EOT, 7, EOT] -> [5, 6, EOT] and [7, EOT]; with begin_with_eot,
    [EOT, 5, 6, EOT] and [EOT, 7, EOT].

    Args:
        path: A split, a bare .bin file, an array of ids, or Tokens; see Tokens.
        max_length: Largest length of an item. Longer documents are cut; None: no limit.
        dtype: Type of the ids of a bare file, "uint16" or "uint32".
        eot_token: Id that ends a document, for a bare file or an array.
        begin_with_eot: Whether an end-of-text token comes before each document, too. A model can
            only begin a document if it was trained on such items (train_gpt2.py does so).

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: The corpus is one running text, eot_token is unknown, there are no tokens, or
            max_length leaves no token of a document.
        IndexError: On reading, the index is out of range.
    """

    def __init__(
        self,
        path: str | Path | ArrayLike | Tokens,
        max_length: int | None = None,
        dtype: DTypeLike | None = None,
        eot_token: int | None = None,
        begin_with_eot: bool = False,
    ):
        if max_length is not None and max_length < 1 + begin_with_eot:
            raise ValueError(f"max_length must be at least {1 + begin_with_eot}, not {max_length}")
        self.tokens = path if isinstance(path, Tokens) else Tokens(path, dtype, eot_token)
        self.max_length = max_length
        ends = self.tokens.document_ends()
        if not len(ends):
            raise ValueError(f"{self.tokens.path} is empty: there are no documents")
        self.starts = np.append(0, ends[:-1])
        self.begin_with_eot = begin_with_eot
        lengths = ends - self.starts + begin_with_eot
        self.lengths = np.minimum(lengths, max_length or lengths.max())

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> torch.Tensor:
        if not -len(self) <= index < len(self):
            raise IndexError(
                f"document {index} is out of range: {self.tokens.path} has {len(self):,}"
            )
        num_tokens = int(self.lengths[index]) - self.begin_with_eot
        ids = torch.from_numpy(self.tokens.read(self.starts[[index]], num_tokens)[0])
        if self.begin_with_eot:
            ids = torch.nn.functional.pad(ids, (1, 0), value=self.tokens.eot_token)
        return ids

    def split(self, size: float | int) -> tuple["DocumentDataset", "DocumentDataset"]:
        """Divide the documents in two views: (first, last).

        Example: of 10 documents, split(0.2) and split(2) both give views of 8 and 2.

        Args:
            size: Size of `last`: a share between 0 and 1, or a number of documents.

        Returns:
            Two datasets, (first, last).

        Raises:
            ValueError: A view would have no document.
        """
        check_split_size(size)
        count = math.ceil(len(self) * size) if size < 1 else int(size)
        if not 0 < count < len(self):
            raise ValueError(f"{len(self):,} documents can't be split by {size}")
        middle = int(self.starts[len(self) - count])
        first = self.tokens.view(0, middle)
        last = self.tokens.view(middle, len(self.tokens))
        options: dict[str, Any] = {
            "max_length": self.max_length, "begin_with_eot": self.begin_with_eot
        }  # fmt: skip
        return DocumentDataset(first, **options), DocumentDataset(last, **options)

    def count_tokens(self) -> dict[str, int]:
        """Return how many tokens are "trained" on and "cut" by max_length.

        The two numbers add up to the tokens of the split. A token that begin_with_eot adds is in
        neither: it is never a target.
        """
        trained = int(self.lengths.sum()) - self.begin_with_eot * len(self)
        return {"trained": trained, "cut": len(self.tokens) - trained}


def pad_documents(documents: Sequence[torch.Tensor], pad_token: int = 0) -> dict[str, torch.Tensor]:
    """Collate documents to a batch, padded to the longest one.

    - `labels` are the ids, not shifted (Hugging Face's convention), and -100 at the padding.
    - Labels come from lengths, so the end of text is learned even if its id is the pad token.

    Example: [5, 6, EOT] and [7, EOT] -> input_ids [[5, 6, EOT], [7, EOT, 0]],
    attention_mask [[1, 1, 1], [1, 1, 0]], labels [[5, 6, EOT], [7, EOT, -100]].

    Args:
        documents: B tensors, (n,) int64 each.
        pad_token: Any id. The attention mask hides the padding, and its labels are -100.

    Returns:
        A dict of input_ids, attention_mask and labels, (B, T) int64 each, with T the length of the
        longest document.

    Raises:
        ValueError: There are no documents.
    """
    if not len(documents):
        raise ValueError("there are no documents to pad")
    T = max(len(document) for document in documents)
    input_ids = torch.full((len(documents), T), pad_token)
    mask = torch.zeros(len(documents), T, dtype=torch.int64)
    labels = torch.full((len(documents), T), -100)
    for row, document in enumerate(documents):
        input_ids[row, : len(document)] = document
        mask[row, : len(document)] = 1
        labels[row, : len(document)] = document
    return {"input_ids": input_ids, "attention_mask": mask, "labels": labels}
