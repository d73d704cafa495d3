"""Packing: whole documents in rows of one length, almost without padding.

documents = DocumentDataset("data/wikitext-2/train")
loader = DataLoader(pack_documents(documents, 1024), batch_size=8)
"""

import numpy as np
import torch
from torch.utils.data import Dataset


def pack_documents(documents, sequence_length: int, pad_token: int = 0) -> "PackedDocuments":
    """Pack whole documents into rows of sequence_length tokens; see PackedDocuments."""
    return PackedDocuments(documents, sequence_length, pad_token)


class PackedDocuments(Dataset):
    """Rows of sequence_length tokens that hold whole documents.

    - Best fit decreasing: the longest document first, each into the row where it leaves the least
      room (Ding et al. 2024).
    - Only a document longer than a row is divided: into full rows and a rest, which is packed like
      a document. No token is dropped.
    - `document_ids` give the mask (document_mask) that keeps documents separate; transformers does
      so from `position_ids` alone, if use_cache=False and no attention_mask is given.
    - `labels` are -100 at the first token of each document: nothing before it predicts it.

    Example: [5, 6, EOT] and [7, EOT] in rows of 6 -> input_ids [5, 6, EOT, 7, EOT, 0],
    document_ids [0, 0, 0, 1, 1, -1], position_ids [0, 1, 2, 0, 1, 0],
    labels [-100, 6, EOT, -100, EOT, -100].

    Args:
        documents: A DocumentDataset, or a list of (n,) int64 tensors.
        sequence_length: Tokens of a row.
        pad_token: Id that fills the end of a row (document id -1).

    Raises:
        ValueError: If sequence_length is below 1.
        IndexError: On reading, if the index is out of range.
    """

    def __init__(self, documents, sequence_length: int, pad_token: int = 0):
        if sequence_length < 1:
            raise ValueError(f"sequence_length must be at least 1, not {sequence_length}")
        self.documents = documents
        self.sequence_length = sequence_length
        self.pad_token = pad_token
        if hasattr(documents, "lengths"):
            lengths = documents.lengths
        else:
            lengths = np.array([len(document) for document in documents], np.int64)
        # A part is a document, or a row's length of one that is longer than a row.
        parts_of_each = -(-lengths // sequence_length)
        first_parts = np.cumsum(parts_of_each) - parts_of_each
        self.part_document = np.repeat(np.arange(len(lengths)), parts_of_each)
        number_in_document = np.arange(len(self.part_document)) - np.repeat(
            first_parts, parts_of_each
        )
        self.part_offset = number_in_document * sequence_length
        self.part_length = np.minimum(
            lengths[self.part_document] - self.part_offset, sequence_length
        )
        rows = best_fit(self.part_length, sequence_length)
        self.parts_by_row = np.argsort(rows, kind="stable")
        num_rows = rows.max(initial=-1) + 1
        self.row_bounds = np.searchsorted(rows[self.parts_by_row], np.arange(num_rows + 1))

    def __len__(self) -> int:
        return len(self.row_bounds) - 1

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Return input_ids, position_ids, labels, document_ids: (sequence_length,) int64 each."""
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} is out of range: there are {len(self):,}")
        T = self.sequence_length
        input_ids = torch.full((T,), self.pad_token)
        position_ids = torch.zeros(T, dtype=torch.int64)
        labels = torch.full((T,), -100)
        document_ids = torch.full((T,), -1)
        start = 0
        parts = self.parts_by_row[self.row_bounds[index] : self.row_bounds[index + 1]]
        for number, part in enumerate(parts):
            length = int(self.part_length[part])
            offset = int(self.part_offset[part])
            end = start + length
            document = self.documents[self.part_document[part]]
            input_ids[start:end] = document[offset : offset + length]
            position_ids[start:end] = torch.arange(length)
            labels[start + 1 : end] = input_ids[start + 1 : end]
            document_ids[start:end] = number
            start = end
        position_ids[start:] = torch.arange(T - start)
        return {
            "input_ids": input_ids,
            "position_ids": position_ids,
            "labels": labels,
            "document_ids": document_ids,
        }

    def count_tokens(self) -> dict[str, int]:
        """Return how many tokens are "trained" on, "padded", and "cut" by max_length.

        trained + cut = tokens of the split; trained + padded = tokens of all rows.
        """
        trained = int(self.part_length.sum())
        padded = len(self) * self.sequence_length - trained
        cut = 0
        if hasattr(self.documents, "count_tokens"):
            cut = self.documents.count_tokens()["cut"]
        return {"trained": trained, "padded": padded, "cut": cut}


def best_fit(lengths: np.ndarray, row_length: int) -> np.ndarray:
    """Assign lengths to rows: the longest first, each to the row where it leaves the least room.

    Takes about one second for a million lengths.

    Example: lengths [3, 5, 2, 4, 5, 3] in rows of 8 -> rows [1, 0, 2, 2, 1, 0]:
    5 + 3, 5 + 3, 4 + 2.

    Args:
        lengths: (n,) integers from 1 to row_length.
        row_length: Length of each row.

    Returns:
        (n,) int64, the row of each.
    """
    assigned = np.empty(len(lengths), np.int64)
    num_rows = 0
    rows_by_room: list[list[int]] = [[] for _ in range(row_length + 1)]
    rooms = 0  # a bit set: bit i is set if rows_by_room[i] has a row
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
