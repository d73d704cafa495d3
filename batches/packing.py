"""Packing: whole documents in rows of one length, almost without padding.

documents = DocumentDataset("data/wikitext-2/train")
loader = DataLoader(pack_documents(documents, 1024), batch_size=8)
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch.utils.data import Dataset

from batches.documents import DocumentDataset


def pack_documents(
    documents: DocumentDataset | Sequence[torch.Tensor], sequence_length: int, pad_token: int = 0
) -> "PackedDocuments":
    """Pack whole documents into rows of sequence_length tokens.

    Args:
        documents: A DocumentDataset, or a list of (n,) int64 tensors.
        sequence_length: Tokens of a row.
        pad_token: Id that fills the end of a row (document id -1).

    Returns:
        The rows, as PackedDocuments.

    Raises:
        ValueError: The sequence_length is below 1.
    """
    return PackedDocuments(documents, sequence_length, pad_token)


class PackedDocuments(Dataset):
    """Rows of sequence_length tokens that hold whole documents.

    - Best fit decreasing: the longest document comes first, and each document goes into the row
      where it leaves the least room (Ding et al. 2024).
    - Only a document longer than a row is divided: into full rows and a rest, which is packed like
      a document. No token is dropped.
    - document_mask makes of `document_ids` the mask that keeps documents separate. transformers
      needs only `position_ids` to keep them separate, if use_cache=False and no attention_mask is
      given.
    - `labels` are -100 at the first token of each document: no earlier token predicts it.

    Example: [5, 6, EOT] and [7, EOT] in rows of 6 -> input_ids [5, 6, EOT, 7, EOT, 0],
    document_ids [0, 0, 0, 1, 1, -1], position_ids [0, 1, 2, 0, 1, 0],
    labels [-100, 6, EOT, -100, EOT, -100].

    Args:
        documents: A DocumentDataset, or a list of (n,) int64 tensors.
        sequence_length: Tokens of a row.
        pad_token: Id that fills the end of a row (document id -1).

    Raises:
        ValueError: The sequence_length is below 1.
        IndexError: On reading, the index is out of range.
    """

    def __init__(
        self,
        documents: DocumentDataset | Sequence[torch.Tensor],
        sequence_length: int,
        pad_token: int = 0,
    ):
        if sequence_length < 1:
            raise ValueError(f"sequence_length must be at least 1, not {sequence_length}")
        self.documents = documents
        self.sequence_length = sequence_length
        self.pad_token = pad_token
        if isinstance(documents, DocumentDataset):
            lengths = documents.lengths
        else:
            lengths = np.array([len(document) for document in documents], np.int64)
        # A fragment is a whole document, or at most a row's length of a longer document.
        num_fragments = -(-lengths // sequence_length)  # of each document
        first_fragments = np.cumsum(num_fragments) - num_fragments
        self.fragment_document = np.repeat(np.arange(len(lengths)), num_fragments)
        fragments = np.arange(len(self.fragment_document))
        number_in_document = fragments - np.repeat(first_fragments, num_fragments)
        self.fragment_offset = number_in_document * sequence_length
        self.fragment_length = np.minimum(
            lengths[self.fragment_document] - self.fragment_offset, sequence_length
        )
        rows = best_fit(self.fragment_length, sequence_length)
        self.fragments_by_row = np.argsort(rows, kind="stable")
        num_rows = rows.max(initial=-1) + 1
        self.row_bounds = np.searchsorted(rows[self.fragments_by_row], np.arange(num_rows + 1))

    def __len__(self) -> int:
        return len(self.row_bounds) - 1

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Return a row: input_ids, position_ids, labels and document_ids, (T,) int64 each."""
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} is out of range: there are {len(self):,}")
        T = self.sequence_length
        input_ids = torch.full((T,), self.pad_token)
        position_ids = torch.zeros(T, dtype=torch.int64)
        labels = torch.full((T,), -100)
        doc_ids = torch.full((T,), -1)
        start = 0
        fragments = self.fragments_by_row[self.row_bounds[index] : self.row_bounds[index + 1]]
        for number, fragment in enumerate(fragments):
            length = int(self.fragment_length[fragment])
            offset = int(self.fragment_offset[fragment])
            end = start + length
            document = self.documents[self.fragment_document[fragment]]
            input_ids[start:end] = document[offset : offset + length]
            position_ids[start:end] = torch.arange(length)
            labels[start + 1 : end] = input_ids[start + 1 : end]
            doc_ids[start:end] = number
            start = end
        position_ids[start:] = torch.arange(T - start)
        return {
            "input_ids": input_ids,
            "position_ids": position_ids,
            "labels": labels,
            "document_ids": doc_ids,
        }

    def count_tokens(self) -> dict[str, int]:
        """Return how many tokens are "trained" on, "padded", and "cut" by max_length.

        trained + cut = tokens of the split; trained + padded = tokens of all rows, but for those
        that begin_with_eot adds, which are never targets.
        """
        trained = int(self.fragment_length.sum())
        padded = len(self) * self.sequence_length - trained
        cut = 0
        if isinstance(self.documents, DocumentDataset):
            cut = self.documents.count_tokens()["cut"]
            trained -= self.documents.begin_with_eot * len(self.documents)
        return {"trained": trained, "padded": padded, "cut": cut}


def best_fit(lengths: np.ndarray, row_length: int) -> np.ndarray:
    """Return the row for each length: the longest first, each where it leaves the least room.

    A million lengths take about one second.

    Example: lengths [3, 5, 2, 4, 5, 3] in rows of 8 -> [1, 0, 2, 2, 1, 0]. Row 0 holds 5 + 3, row 1
    holds 3 + 5, row 2 holds 2 + 4.

    Args:
        lengths: Integers from 1 to row_length, (n,).
        row_length: Length of each row.

    Returns:
        The row of each length, (n,) int64.
    """
    assigned = np.empty(len(lengths), np.int64)
    num_rows = 0
    rows_by_room: list[list[int]] = [[] for _ in range(row_length + 1)]
    rooms = 0  # a set as bits: bit i is set if rows_by_room[i] holds a row
    longest_first = np.argsort(-lengths, kind="stable")
    for i, length in zip(longest_first.tolist(), lengths[longest_first].tolist()):
        if fitting := rooms >> length:
            least = fitting & -fitting  # the lowest bit
            room = length + least.bit_length() - 1
            row = rows_by_room[room].pop()
            if not rows_by_room[room]:
                rooms ^= 1 << room
        else:
            room = row_length
            row = num_rows
            num_rows += 1
        assigned[i] = row
        room -= length
        if room:
            rows_by_room[room].append(row)
            rooms |= 1 << room
    return assigned
