"""Documents as they are, instead of windows over them: one by one, padded, packed; and masks that
keep documents in one row apart.

    documents = DocumentDataset("data/wikitext-2/train", max_length=512)
    loader = DataLoader(documents, batch_size=8, collate_fn=pad_documents)
    loader = DataLoader(pack_documents(documents, 1024), batch_size=8)

Batches are dicts by Hugging Face's convention: labels are the ids themselves, which the model
shifts, and -100 where nothing is to be learnt. They come from lengths: an end of text is learnt
even where it also fills the rows.
"""

import math

import numpy as np
import torch
from torch.nn.attention.flex_attention import create_block_mask
from torch.utils.data import Dataset

from batches.tokens import Tokens


def document_ids(tokens, eot_token: int):
    """(B, T) token ids -> (B, T) int64: which of the row's documents each belongs to, from 0. An
    end of text belongs to the document that it ends."""
    ends = tokens == eot_token
    return ends.cumsum(-1) - ends.long()


def document_positions(ids):
    """(B, T) document ids -> (B, T) int64: positions that start from 0 in each document."""
    places = torch.arange(ids.shape[-1], device=ids.device).expand_as(ids)
    first = torch.ones_like(ids, dtype=torch.bool)
    first[..., 1:] = ids[..., 1:] != ids[..., :-1]
    return places - torch.where(first, places, 0).cummax(-1).values


def document_mask(ids):
    """(B, T) document ids -> (B, T, T) bool: whether a row's token (second axis) sees another
    (last axis), which is of its document and not behind it: block-diagonal and causal."""
    T = ids.shape[-1]
    causal = torch.ones(T, T, dtype=torch.bool, device=ids.device).tril()
    return (ids[..., :, None] == ids[..., None, :]) & causal


def attention_mask(ids, dense: bool = False):
    """(B, T) document ids -> the mask that GPT's forward takes: document_mask, or, on a GPU, which
    has a kernel for it, a BlockMask of flex_attention, that leaves whole blocks out. That kernel
    has no dropout: dense=True gives the former there, too."""
    if dense or not ids.is_cuda:
        return document_mask(ids)
    (B, T), device = ids.shape, ids.device

    def sees(b, _, i, j):
        return (ids[b, i] == ids[b, j]) & (i >= j)

    return create_block_mask(sees, B, None, T, T, device=device)


class DocumentDataset(Dataset):
    """The documents of a split, each with its end of text: items are (n,) int64 tensors.

    path, dtype, eot_token: as for Tokens. max_length: tokens of a document that are kept, its end
    of text among them; None: all. `lengths`, (len,) int64, are those of the items.
    """

    def __init__(self, path, max_length: int | None = None, dtype=None, eot_token=None):
        if max_length is not None and max_length < 1:
            raise ValueError(f"max_length must be at least 1, not {max_length}")
        self.tokens = path if isinstance(path, Tokens) else Tokens(path, dtype, eot_token)
        self.max_length = max_length
        ends = self.tokens.document_ends()
        self.starts = np.append(0, ends[:-1])
        self.lengths = np.minimum(ends - self.starts, max_length or len(self.tokens))

    def __len__(self):
        return len(self.starts)

    def __getitem__(self, index):
        if not -len(self) <= index < len(self):
            raise IndexError(f"document {index} of {self.tokens.path}: there are {len(self):,}")
        ids = self.tokens.read(self.starts[[index]], int(self.lengths[index]))
        return torch.from_numpy(ids[0])

    def split(self, size: float | int):
        """(first, last): views of the first documents and the last, of which `size` are the last's:
        a share (below 1), or a number. Raises ValueError where one would have none."""
        count = math.ceil(len(self) * size) if size < 1 else size
        if not 0 < count < len(self):
            raise ValueError(f"{len(self):,} documents can't be split by {size}")
        cut = int(self.starts[len(self) - count])
        parts = (0, cut), (cut, len(self.tokens))
        return tuple(DocumentDataset(self.tokens.part(*p), self.max_length) for p in parts)

    def account(self) -> dict[str, int]:
        """trained + cut (by max_length) = tokens of the split."""
        trained = int(self.lengths.sum())
        return {"trained": trained, "cut": len(self.tokens) - trained}


def pad_documents(documents, pad_token: int = 0) -> dict[str, torch.Tensor]:
    """Documents, (n,) int64 each -> input_ids, attention_mask, labels: (B, T) int64, where T is the
    longest one's length. Any id serves as pad_token: the mask hides it and no label has it."""
    T = max(len(document) for document in documents)
    batch = {
        "input_ids": torch.full((len(documents), T), pad_token),
        "attention_mask": torch.zeros(len(documents), T, dtype=torch.int64),
        "labels": torch.full((len(documents), T), -100),
    }
    for i, document in enumerate(documents):
        batch["input_ids"][i, : len(document)] = document
        batch["attention_mask"][i, : len(document)] = 1
        batch["labels"][i, : len(document)] = document
    return batch


def pack_documents(documents, sequence_length: int, pad_token: int = 0) -> "PackedDocuments":
    """Packs whole documents into rows of sequence_length tokens; see PackedDocuments."""
    return PackedDocuments(documents, sequence_length, pad_token)


class PackedDocuments(Dataset):
    """Rows of whole documents, each put where it leaves the least room (best fit, the longest
    first). Only what is longer than a row is divided, into rows of its own and a rest that is
    packed as a document (Ding et al. 2024); the tokens are all there.

    documents: a DocumentDataset, or a list of (n,) int64 tensors. Items are dicts of
    (sequence_length,) int64 tensors: input_ids; document_ids, for document_mask (-1: padding);
    position_ids, from 0 in each document, by which transformers keeps them apart (given
    use_cache=False and no attention_mask); labels, -100 at the first token of each document, which
    nothing before it foretells.
    """

    def __init__(self, documents, sequence_length: int, pad_token: int = 0):
        self.documents, self.sequence_length, self.pad_token = documents, sequence_length, pad_token
        if not hasattr(documents, "lengths"):
            lengths = np.array([len(document) for document in documents], np.int64)
        else:
            lengths = documents.lengths
        count = -(-lengths // sequence_length)  # parts of each
        self.document = np.repeat(np.arange(len(lengths)), count)
        part = np.arange(len(self.document)) - np.repeat(np.cumsum(count) - count, count)
        self.offset = part * sequence_length
        self.length = np.minimum(lengths[self.document] - self.offset, sequence_length)
        row = best_fit(self.length, sequence_length)
        self.parts = np.argsort(row, kind="stable")  # those of one row after another
        self.bounds = np.searchsorted(row[self.parts], np.arange(row.max(initial=-1) + 2))

    def __len__(self):
        return len(self.bounds) - 1

    def __getitem__(self, index):
        if not 0 <= index < len(self):
            raise IndexError(f"row {index}: there are {len(self):,}")
        T = self.sequence_length
        ids, positions = torch.full((T,), self.pad_token), torch.zeros(T, dtype=torch.int64)
        labels, of, start = torch.full((T,), -100), torch.zeros(T, dtype=torch.int64), 0
        for number, i in enumerate(self.parts[self.bounds[index] : self.bounds[index + 1]]):
            end, offset = start + int(self.length[i]), int(self.offset[i])
            ids[start:end] = self.documents[self.document[i]][offset : offset + end - start]
            positions[start:end] = torch.arange(end - start)
            labels[start + 1 : end] = ids[start + 1 : end]
            of[start:], start = number, end
        of[start:], positions[start:] = -1, torch.arange(T - start)
        return {"input_ids": ids, "position_ids": positions, "labels": labels, "document_ids": of}

    def account(self) -> dict[str, int]:
        """trained + cut (by the documents' max_length) = tokens of the split, and trained + padded
        = tokens of all rows."""
        trained = int(self.length.sum())
        cut = self.documents.account()["cut"] if hasattr(self.documents, "account") else 0
        return {
            "trained": trained,
            "padded": len(self) * self.sequence_length - trained,
            "cut": cut,
        }


def best_fit(lengths, size: int) -> np.ndarray:
    """(n,) lengths up to `size` -> (n,) int64, the row each goes to: the longest first, into the
    row where it leaves the least room. A million take a second."""
    rows, of = 0, np.empty(len(lengths), np.int64)
    free = [[] for _ in range(size + 1)]  # rows by the room that they have left
    rooms = 0  # bit i: free[i] has a row
    order = np.argsort(-lengths, kind="stable")
    for i, length in zip(order.tolist(), lengths[order].tolist()):
        if fitting := rooms >> length:
            room = length + (fitting & -fitting).bit_length() - 1  # the least
            row = free[room].pop()
            if not free[room]:
                rooms ^= 1 << room
        else:
            row, rows, room = rows, rows + 1, size
        of[i], room = row, room - length
        if room:
            free[room].append(row)
            rooms |= 1 << room
    return of
