"""Scores: how well a model predicts each token of a text (sample.py --score).

    scoring = ScoringModel(model, receive=batches.append)
    evaluate(scoring, loader, compute, Ranks())       # train_gpt2.evaluate, as for validation

The evaluator is that of validation. ScoringModel stands in for the model and hands on the loss of
each token, which evaluate only adds up.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from model import GPT
from training.corpora import bits_per_byte

MAX_PROBS = 6_500_000  # probabilities in memory at once: 26 MB
NUM_ALTERNATIVES = 5  # of each token: the most likely ids in its place


@dataclass(frozen=True)
class Alternatives:
    """What a model expected in the places of n tokens, in float32.

    Losses may be computed in another number type, so -ln of a probability can differ a little.

    Attributes:
        token_probs: (n,) float32 probability of each token.
        ranks: (n,) int64 rank of each token among all ids, from 1 for the most likely one.
        ids: (n, 5) int64, the most likely ids, most likely first.
        probs: (n, 5) float32, their probabilities.
    """

    token_probs: np.ndarray
    ranks: np.ndarray
    ids: np.ndarray
    probs: np.ndarray


@dataclass(frozen=True)
class TokenScores:
    """Scores of n tokens of a text, one after another.

    Attributes:
        ids: (n,) int64, the tokens.
        nats: (n,) float64, the loss of each token: -ln of its probability.
        alternatives: What the model expected in the place of each of the first tokens, perhaps of
            fewer than n.
    """

    ids: np.ndarray
    nats: np.ndarray
    alternatives: Alternatives


class ScoringModel(torch.nn.Module):
    """A GPT that hands on the score of each target while a loss is computed.

    Rows of targets must come in the order of the text, as evaluate gives them.

    Args:
        model: The model, not compiled.
        receive: Takes the TokenScores of one micro-batch after another.
        num_alternatives: Number of tokens, from the first target on, that get Alternatives.
    """

    def __init__(
        self, model: GPT, receive: Callable[[TokenScores], object], num_alternatives: int = 0
    ):
        super().__init__()
        self.model = model
        self.receive = receive
        self.num_left = num_alternatives
        self.hidden: torch.Tensor | None = None  # (B, T, C), what the output layer gets
        model.transformer.ln_f.register_forward_hook(self._keep_hidden)

    def _keep_hidden(self, module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> None:
        self.hidden = output

    def forward(
        self, idx: torch.Tensor, targets: torch.Tensor, reduction: str, **mask_kwargs: Any
    ) -> tuple[None, torch.Tensor]:
        """Return (None, loss), the sum of the loss, as GPT.forward does with reduction "sum"."""
        _, losses = self.model(idx, targets, reduction="none", **mask_kwargs)
        targets = targets.flatten().cpu()
        is_target = targets != -100
        ids = targets[is_target]
        num_detailed = min(self.num_left, len(ids))
        self.num_left -= num_detailed
        places = is_target.nonzero()[:num_detailed, 0]
        hidden = self.hidden.flatten(0, 1)  # type: ignore[union-attr]
        self.receive(
            TokenScores(
                ids.numpy(),
                losses.cpu()[is_target].double().numpy(),  # an Apple GPU has no float64
                find_alternatives(self.model, hidden[places.to(hidden.device)], ids[:num_detailed]),
            )
        )
        return None, losses.sum()


def find_alternatives(model: GPT, hidden: torch.Tensor, ids: torch.Tensor) -> Alternatives:
    """Return what a model expected in the places of n tokens, computed in float32.

    Args:
        model: The model.
        hidden: (n, C), the input of the output layer in the position before each token.
        ids: (n,) token ids, on the CPU.
    """
    embedding = model.transformer.wte.weight[: model.config.vocab_size].float()
    rows = max(1, MAX_PROBS // len(embedding))
    token_probs = []
    ranks = []
    top_ids = []
    top_probs = []
    with torch.autocast(hidden.device.type, enabled=False):
        ids = ids.to(hidden.device)
        for chunk, chunk_ids in zip(hidden.float().split(rows), ids.split(rows)):
            probs = torch.nn.functional.linear(chunk, embedding).softmax(-1)
            prob_of_token = probs.gather(1, chunk_ids[:, None])  # (rows, 1)
            top = probs.topk(min(NUM_ALTERNATIVES, len(embedding)))
            token_probs.append(prob_of_token[:, 0])
            ranks.append((probs > prob_of_token).sum(-1) + 1)
            top_ids.append(top.indices)
            top_probs.append(top.values)
    return Alternatives(
        torch.cat(token_probs).cpu().numpy(),
        torch.cat(ranks).cpu().numpy(),
        torch.cat(top_ids).cpu().numpy(),
        torch.cat(top_probs).cpu().numpy(),
    )


def join_scores(parts: Sequence[TokenScores]) -> TokenScores:
    """Return the scores of the tokens that have alternatives as one.

    Args:
        parts: What a ScoringModel gave, one part after another; at least one.
    """
    lengths = [len(part.alternatives.ids) for part in parts]
    alternatives = [part.alternatives for part in parts]
    return TokenScores(
        np.concatenate([part.ids[:n] for part, n in zip(parts, lengths)]),
        np.concatenate([part.nats[:n] for part, n in zip(parts, lengths)]),
        Alternatives(
            np.concatenate([each.token_probs for each in alternatives]),
            np.concatenate([each.ranks for each in alternatives]),
            np.concatenate([each.ids for each in alternatives]),
            np.concatenate([each.probs for each in alternatives]),
        ),
    )


@dataclass(frozen=True)
class Score:
    """Loss of a document, or of a whole text.

    Attributes:
        nats_per_token: Mean loss of the tokens that are predicted; NaN if there are none.
        num_tokens: Number of tokens, with the end-of-text token of a document.
        num_bytes: UTF-8 bytes of the text.
    """

    nats_per_token: float
    num_tokens: int
    num_bytes: int

    def __str__(self) -> str:
        parts = [f"{self.num_tokens:,} tokens, {self.num_bytes:,} bytes"]
        if not math.isnan(self.nats_per_token):
            parts.append(f"{self.nats_per_token:.4f} nats per token")
            if self.num_bytes:
                bits = bits_per_byte(self.nats_per_token, self.num_bytes / self.num_tokens)
                parts.append(f"{bits:.4f} bits per byte")
        return ", ".join(parts)


class DocumentScores:
    """Adds up the losses of tokens to the Score of each document.

    Example: the documents "ab" and "c" by bytes are the ids [97, 98, EOT, 99, EOT]. The first
    document has 3 tokens, 2 of which are predicted; the second has 2, both predicted.

    Args:
        eot_token: Id that ends a document; None: a running text, which has no documents.
        num_bytes: UTF-8 bytes of each document.
        receive: Takes the number of a document, from 1, and its Score.
    """

    def __init__(
        self,
        eot_token: int | None,
        num_bytes: Iterable[int],
        receive: Callable[[int, Score], object],
    ):
        self.eot_token = eot_token
        self.num_bytes = enumerate(num_bytes, 1)
        self.receive = receive
        self.nats = 0.0  # of the document that is not complete yet
        self.num_targets = 0
        self.num_unpredicted = 1  # the first token of the text

    def start(self, first_id: int) -> None:
        """Begin with the first token of the text, which nothing predicts."""
        if first_id == self.eot_token:  # an empty document
            self._finish()

    def add(self, scores: TokenScores) -> None:
        """Add the tokens that follow."""
        if self.eot_token is None:
            return
        ends = np.flatnonzero(scores.ids == self.eot_token) + 1
        parts = np.split(scores.nats, ends)
        for i, nats in enumerate(parts):
            self.nats += float(nats.sum())
            self.num_targets += len(nats)
            if i < len(ends):
                self._finish()

    def _finish(self) -> None:
        mean = self.nats / self.num_targets if self.num_targets else math.nan
        num_tokens = self.num_targets + self.num_unpredicted
        number, num_bytes = next(self.num_bytes)
        self.receive(number, Score(mean, num_tokens, num_bytes))
        self.nats = 0.0
        self.num_targets = 0
        self.num_unpredicted = 0
