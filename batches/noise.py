"""Token noise: some input tokens are replaced by random ones, against overfitting.

data = NoisyTextDataset(TextDataset("data/tinyshakespeare/train", 256), share=0.1, seed=0)
"""

from typing import Protocol

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch.utils.data import Dataset

from batches.tokens import Tokens
from common.hashing import splitmix64


class WindowDataset(Protocol):
    """What NoisyTextDataset and the preview use of a TextDataset (dataset.py)."""

    tokens: Tokens
    sequence_length: int

    def __len__(self) -> int: ...

    def __getitem__(self, index: ArrayLike) -> tuple[torch.Tensor, torch.Tensor]: ...

    def window_starts(self, index: ArrayLike) -> np.ndarray:
        """Return the position of each window's first token."""

    def count_tokens(self) -> dict[str, int]:
        """Return how many tokens are "trained" on and "left_out"."""


def add_token_noise(
    x: torch.Tensor,
    starts: ArrayLike,
    share: float,
    seed: int,
    vocab_size: int,
    eot_token: int | None = None,
) -> torch.Tensor:
    """Return x with a share of its tokens replaced by random ones.

    - The replaced tokens and their random ids depend only on the seed, the start of the window and
      the position in the window: a window gets the same noise in any batch, on any rank.
    - An end-of-text token is neither replaced nor inserted, so documents keep their ends.

    Example: x=[5, 6, EOT, 7], share=0.25 -> [5, 201, EOT, 7].

    Args:
        x: (B, T) or (T,) int64 ids.
        starts: Position of each window in the split, (B,) or scalar.
        share: Share of the tokens that are replaced, from 0 to 1.
        seed: Seed of the noise.
        vocab_size: Random ids are below this number.
        eot_token: Id of the end-of-text token, or None if there is none.

    Returns:
        A tensor of the shape of `x`, int64.
    """
    ids = x.numpy()
    positions = np.arange(ids.shape[-1], dtype=np.uint64)
    starts = np.asarray(starts, np.uint64)[..., None]
    window_hashes = splitmix64(starts ^ splitmix64(np.array([seed], np.uint64)))
    hashes = splitmix64(window_hashes + positions)
    threshold = np.uint64(min(int(share * 2**64), 2**64 - 1))
    replaced = hashes < threshold
    if eot_token is None:
        random_ids = (splitmix64(~hashes) % np.uint64(vocab_size)).astype(np.int64)
    else:
        replaced &= ids != eot_token
        random_ids = (splitmix64(~hashes) % np.uint64(vocab_size - 1)).astype(np.int64)
        random_ids += random_ids >= eot_token  # skip the end of text
    return torch.from_numpy(np.where(replaced, random_ids, ids))


class NoisyTextDataset(Dataset):
    """The windows of a TextDataset with token noise in x; y stays the text.

    Args:
        dataset: A TextDataset.
        share: Share of the tokens of x that are replaced, from 0 to 1.
        seed: Seed of the noise.

    Raises:
        ValueError: The share is out of range, or the vocabulary size is unknown.
    """

    def __init__(self, dataset: WindowDataset, share: float, seed: int = 0):
        if not 0 <= share <= 1:
            raise ValueError(f"the share of token noise must be from 0 to 1, not {share}")
        vocab_size = dataset.tokens.vocab_size
        if vocab_size is None:
            raise ValueError("token noise needs a corpus with a vocabulary (metadata.json)")
        self.dataset = dataset
        self.sequence_length = dataset.sequence_length
        self.vocab_size = vocab_size
        self.share = share
        self.seed = seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: ArrayLike) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (x, y) as the TextDataset does, with noise in x."""
        x, y = self.dataset[index]
        starts = self.dataset.window_starts(index)
        eot_token = self.dataset.tokens.eot_token
        x = add_token_noise(x, starts, self.share, self.seed, self.vocab_size, eot_token)
        return x, y

    def __getitems__(self, indices: list[int]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Return the (x, y) of each index, read in one gather; DataLoader calls this method."""
        x, y = self[indices]
        return list(zip(x, y))
