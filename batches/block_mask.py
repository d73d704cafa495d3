"""The mask of flex_attention that keeps documents separate (Dong et al. 2024)."""

import torch
from torch.nn.attention.flex_attention import BlockMask

BLOCK_SIZE = 128  # tokens, flex_attention's default


def document_block_mask(doc_ids: torch.Tensor) -> BlockMask:
    """Return the BlockMask that is causal and separates documents.

    - flex_attention computes attention in blocks of 128 queries x 128 keys. A block is needed if
      one of its queries may attend to one of its keys. A block is "full", and needs no mask
      inside, if every query may attend to every key.
    - Document ids never decrease along a row. The first and the last document id of 128 tokens
      therefore decide whether a block is needed and whether it is full.
    - The result equals that of create_block_mask, which compares all T x T pairs of tokens. For
      (16, 1024) ids on one CPU core, create_block_mask takes 91 ms and this function 0.8 ms
      (python -m bench.block_mask).

    Args:
        doc_ids: Document ids, (B, T) int64, never decreasing along a row.

    Returns:
        A BlockMask of shape (B, 1, T, T), on the device of `doc_ids`.
    """
    T = doc_ids.shape[1]
    num_blocks = -(-T // BLOCK_SIZE)
    device = doc_ids.device
    starts = torch.arange(0, num_blocks * BLOCK_SIZE, BLOCK_SIZE, device=device)
    first = doc_ids[:, starts]  # (B, num_blocks)
    last = doc_ids[:, (starts + BLOCK_SIZE - 1).clamp(max=T - 1)]
    number = torch.arange(num_blocks, device=device)
    below = number[:, None] > number[None, :]  # queries (rows) come after keys (columns)
    diagonal = number[:, None] == number[None, :]
    shares_document = last[:, None, :] >= first[:, :, None]  # last key, first query
    same_document = first[:, None, :] == last[:, :, None]  # first key, last query
    complete = starts + BLOCK_SIZE <= T  # the last block may be shorter
    full = (below & same_document & complete[:, None])[:, None]  # (B, 1, num_blocks, num_blocks)
    partial = ((below & shares_document) | diagonal)[:, None] & ~full

    def may_attend(b, h, query, key):
        return (query >= key) & (doc_ids[b, query] == doc_ids[b, key])

    return BlockMask.from_kv_blocks(
        *_count_and_order(partial), *_count_and_order(full),
        BLOCK_SIZE=BLOCK_SIZE, mask_mod=may_attend, seq_lengths=(T, T),
    )  # fmt: skip


def _count_and_order(needed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return how many columns each row needs, and the columns of each row, needed ones first."""
    counts = needed.sum(-1, dtype=torch.int32)
    order = needed.int().argsort(dim=-1, descending=True, stable=True)
    return counts, order.to(torch.int32)
