"""Token noise: some input tokens are replaced by random ones, against overfitting.

data = NoisyTextDataset(TextDataset("data/tinyshakespeare/train", 256), share=0.1, seed=0)
"""

import numpy as np
import torch
from torch.utils.data import Dataset

from common.hashing import splitmix64


def add_token_noise(
    x: torch.Tensor, starts, share: float, seed: int, vocab_size: int, eot_token: int | None = None
) -> torch.Tensor:
    """Replace a share of the tokens by random ones.

    - Which token is replaced, and by what, depends only on the seed, the start of the window and
      the place in the window: a window gets the same noise in any batch, on any rank.
    - An end-of-text token is neither replaced nor inserted, so that documents stay as they are.

    Example: x=[5, 6, EOT, 7], share=0.25 -> [5, 201, EOT, 7].

    Args:
        x: (B, T) or (T,) int64 ids.
        starts: (B,) or scalar: position of each window in the split.
        share: Share of the tokens that are replaced, from 0 to 1.
        seed: Seed of the noise.
        vocab_size: Random ids are below this number.
        eot_token: Id of the end-of-text token, or None if there is none.

    Returns:
        A tensor like `x`.
    """
    ids = x.numpy()
    places = np.arange(ids.shape[-1], dtype=np.uint64)
    starts = np.asarray(starts, np.uint64)[..., None]
    window_hashes = splitmix64(starts ^ splitmix64(np.array([seed], np.uint64)))
    hashes = splitmix64(window_hashes + places)
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
        ValueError: If the share is out of range, or the vocabulary size is not known.
    """

    def __init__(self, dataset, share: float, seed: int = 0):
        if not 0 <= share <= 1:
            raise ValueError(f"the share of token noise must be from 0 to 1, not {share}")
        if dataset.vocab_size is None:
            raise ValueError("token noise needs a corpus with a vocabulary (metadata.json)")
        self.dataset = dataset
        self.share = share
        self.seed = seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index):
        """Return (x, y) as the TextDataset does, with noise in x."""
        x, y = self.dataset[index]
        starts = self.dataset.window_starts(index)
        tokens = self.dataset.tokens
        x = add_token_noise(x, starts, self.share, self.seed, tokens.vocab_size, tokens.eot_token)
        return x, y

    def __getitems__(self, indices) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Return the (x, y) of each index, read in one gather; DataLoader calls it."""
        x, y = self[indices]
        return list(zip(x, y))
