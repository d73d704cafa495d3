"""Whole documents as items, padded to batches, and masks for several documents in one row.

    documents = DocumentDataset("data/wikitext-2/train", max_length=512)
    loader = DataLoader(documents, batch_size=8, collate_fn=pad_documents)

packing.py puts several documents into one row instead of padding each.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch.utils.data import Dataset

from batches.tokens import Tokens, check_split_size


def document_ids(tokens: torch.Tensor, eot_token: int) -> torch.Tensor:
    """Return which document of its row each token belongs to, counted from 0.

    An end-of-text token belongs to the document that it ends.

    Example: tokens=[5, 6, EOT, 7, EOT, 8] -> [0, 0, 0, 1, 1, 2].

    Args:
        tokens: (..., T) token ids.
        eot_token: Id of the end-of-text token.

    Returns:
        (..., T) int64, on the device of `tokens`.
    """
    ends = tokens == eot_token
    return ends.cumsum(-1) - ends.long()


def document_positions(ids: torch.Tensor) -> torch.Tensor:
    """Return each token's position in its document, counted from 0.

    Example: ids=[0, 0, 0, 1, 1, 2] -> [0, 1, 2, 0, 1, 0].

    Args:
        ids: (..., T) document ids.

    Returns:
        (..., T) int64, on the device of `ids`.
    """
    positions = torch.arange(ids.shape[-1], device=ids.device).expand_as(ids)
    begins = torch.ones_like(ids, dtype=torch.bool)
    begins[..., 1:] = ids[..., 1:] != ids[..., :-1]
    return positions - torch.where(begins, positions, 0).cummax(-1).values


def document_mask(ids: torch.Tensor) -> torch.Tensor:
    """Return the attention mask that is causal and keeps documents separate.

    A token attends to itself and to earlier tokens of its document: the mask is block-diagonal.

    Example: ids=[0, 0, 1] -> [[1, 0, 0], [1, 1, 0], [0, 0, 1]].

    Args:
        ids: (..., T) document ids.

    Returns:
        (..., T, T) bool, query by key, on the device of `ids`.
    """
    T = ids.shape[-1]
    causal = torch.ones(T, T, dtype=torch.bool, device=ids.device).tril()
    return (ids[..., :, None] == ids[..., None, :]) & causal


class DocumentDataset(Dataset):
    """The documents of a split, each with its end-of-text token: items are (n,) int64 tensors.

    `lengths` holds the (len,) int64 lengths of the items.

    Example: ids=[5, 6, EOT, 7, EOT] -> [5, 6, EOT] and [7, EOT].

    Args:
        path: A split, a bare .bin file, an array of ids, or Tokens; see Tokens.
        max_length: Tokens of a document that are kept, the end of text included; None: all.
        dtype: "uint16" or "uint32", for a bare file.
        eot_token: Id that ends a document, for a bare file or an array.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If the corpus is one running text, eot_token is unknown, there are no tokens,
            or max_length is below 1.
        IndexError: On reading, if the index is out of range.
    """

    def __init__(
        self,
        path,
        max_length: int | None = None,
        dtype: str | None = None,
        eot_token: int | None = None,
    ):
        if max_length is not None and max_length < 1:
            raise ValueError(f"max_length must be at least 1, not {max_length}")
        self.tokens = path if isinstance(path, Tokens) else Tokens(path, dtype, eot_token)
        self.max_length = max_length
        ends = self.tokens.document_ends()
        if not len(ends):
            raise ValueError(f"{self.tokens.path} is empty: there are no documents")
        self.starts = np.append(0, ends[:-1])
        self.lengths = np.minimum(ends - self.starts, max_length or len(self.tokens))

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> torch.Tensor:
        if not -len(self) <= index < len(self):
            raise IndexError(
                f"document {index} is out of range: {self.tokens.path} has {len(self):,}"
            )
        ids = self.tokens.read(self.starts[[index]], int(self.lengths[index]))
        return torch.from_numpy(ids[0])

    def split(self, size: float | int) -> tuple["DocumentDataset", "DocumentDataset"]:
        """Divide the documents in two views: (first, last).

        Example: of 10 documents, split(0.2) and split(2) both give views of 8 and 2.

        Args:
            size: Size of `last`: a share between 0 and 1, or a number of documents.

        Raises:
            ValueError: If a view would have no document.
        """
        check_split_size(size)
        count = math.ceil(len(self) * size) if size < 1 else int(size)
        if not 0 < count < len(self):
            raise ValueError(f"{len(self):,} documents can't be split by {size}")
        middle = int(self.starts[len(self) - count])
        first = self.tokens.part(0, middle)
        last = self.tokens.part(middle, len(self.tokens))
        return DocumentDataset(first, self.max_length), DocumentDataset(last, self.max_length)

    def count_tokens(self) -> dict[str, int]:
        """Return how many tokens are "trained" on and "cut" by max_length: all of the split."""
        trained = int(self.lengths.sum())
        return {"trained": trained, "cut": len(self.tokens) - trained}


def pad_documents(documents: Sequence[torch.Tensor], pad_token: int = 0) -> dict[str, torch.Tensor]:
    """Collate documents to a batch, padded to the longest one.

    - `labels` are the ids, not shifted (Hugging Face's convention), and -100 at the padding.
    - Labels come from lengths, so that the end of text is learned even if it is the pad token.

    Example: [5, 6, EOT] and [7, EOT] -> input_ids [[5, 6, EOT], [7, EOT, 0]],
    attention_mask [[1, 1, 1], [1, 1, 0]], labels [[5, 6, EOT], [7, EOT, -100]].

    Args:
        documents: B tensors, (n,) int64 each.
        pad_token: Any id; the mask hides it and no label has it.

    Returns:
        input_ids, attention_mask and labels, (B, T) int64 each, with T the longest length.
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
