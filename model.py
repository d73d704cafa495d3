"""GPT-2, exactly: learned positions, pre-LayerNorm blocks, tanh GELU, tied embeddings.

Radford et al., "Language Models are Unsupervised Multitask Learners" (2019). Parameters carry
the names of OpenAI's release, so that weights can be copied key by key.

    model = GPT(GPTConfig(vocab_size=257, n_layer=4, n_head=4, n_embd=128))
    logits, _ = model(x)                          # x, y: (B, T) token ids
    _, loss = model(x, y)
    for token in model.generate(x[:1], 100):      # (1,) token ids, one at a time
        ...
"""

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from corpus.tokenizer import Tokenizer
from training.huggingface import EMBEDDING, read_shape, read_weights, write_model

Mask = torch.Tensor | BlockMask  # which tokens attend to which

GPT2_SIZES = {  # the four released models, as arguments of GPTConfig
    "gpt2": dict(n_layer=12, n_head=12, n_embd=768),  # 124M parameters
    "gpt2-medium": dict(n_layer=24, n_head=16, n_embd=1024),  # 355M
    "gpt2-large": dict(n_layer=36, n_head=20, n_embd=1280),  # 774M
    "gpt2-xl": dict(n_layer=48, n_head=25, n_embd=1600),  # 1558M
}


@dataclass
class GPTConfig:
    """The shape of a GPT-2. Names follow Hugging Face's GPT2Config.

    Raises:
        ValueError: A value is out of range, or n_embd is not a multiple of n_head.
    """

    vocab_size: int = 50257  # token ids
    n_positions: int = 1024  # tokens in the longest sequence
    n_layer: int = 12  # blocks
    n_head: int = 12  # attention heads per block; n_embd is a multiple of it
    n_embd: int = 768  # channels
    dropout: float = 0.0  # probability, 0 <= p < 1
    vocab_multiple: int = 1  # the output layer has rows up to a multiple of this, for speed alone

    def __post_init__(self) -> None:
        for name in ("vocab_size", "n_positions", "n_layer", "n_head", "n_embd", "vocab_multiple"):
            value = getattr(self, name)
            limit = 1000 if name == "n_layer" else 1 << 20
            if type(value) is not int or not 1 <= value <= limit:  # the value may be a file's
                raise ValueError(f"{name} must be a number from 1 to {limit:,}, not {value!r:.60}")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd ({self.n_embd}) must be a multiple of n_head ({self.n_head})")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, not {self.dropout}")

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the token embedding: vocab_size, rounded up to a multiple of vocab_multiple."""
        return math.ceil(self.vocab_size / self.vocab_multiple) * self.vocab_multiple


class Attention(nn.Module):
    """Causal multi-head self-attention: (B, T, C) -> (B, T, C)."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)  # query, key and value
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)
        self.n_head = config.n_head
        self.dropout = config.dropout

    def forward(
        self, x: torch.Tensor, mask: Mask | None = None, cache: list | None = None
    ) -> torch.Tensor:
        """Return (B, T, C) of x (B, T, C); GPT.forward explains mask and this layer's cache."""
        B, T, C = x.shape
        q, k, v = (
            projected.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
            for projected in self.c_attn(x).split(C, dim=2)
        )  # (B, n_head, T, C / n_head)
        causal = mask is None
        if cache is not None:  # a list that is empty, or has keys and values so far
            if cache:
                assert T == 1, "with keys and values in the cache, one token at a time"
                k = torch.cat((cache[0], k), dim=2)
                v = torch.cat((cache[1], v), dim=2)
                causal = False  # the one new token attends to all before it
            cache[:] = k, v
        if isinstance(mask, BlockMask):
            # within a compiled model, flex_attention is compiled with everything else
            compiling = torch.compiler.is_compiling()
            flex: Any = flex_attention if compiling else compiled_flex_attention()
            y = flex(q, k, v, block_mask=mask)
        else:
            dropout = self.dropout if self.training else 0.0
            is_slow = q.is_cpu and q.dtype in (torch.bfloat16, torch.float16)
            attend = attend_in_float32 if is_slow else F.scaled_dot_product_attention
            y = attend(q, k, v, mask, dropout, is_causal=causal)
        y = self.c_proj(y.transpose(1, 2).reshape(B, T, C))
        return F.dropout(y, self.dropout, self.training)


def attend_in_float32(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    dropout: float,
    is_causal: bool,
) -> torch.Tensor:
    """Return scaled_dot_product_attention in q's dtype, but compute it in float32.

    This is for speed alone: on a CPU, the kernel is slower in bfloat16 (docs/design.md).
    """
    with torch.autocast("cpu", enabled=False):
        y = F.scaled_dot_product_attention(
            q.float(), k.float(), v.float(), mask, dropout, is_causal=is_causal
        )
    return y.to(q.dtype)


@functools.cache
def compiled_flex_attention() -> Callable:
    """Return flex_attention, compiled: uncompiled it makes (B, n_head, T, T) weights at once."""
    return torch.compile(flex_attention)


class MLP(nn.Module):
    """Two linear layers, four times as wide in between: (B, T, C) -> (B, T, C)."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)
        self.dropout = config.dropout

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (B, T, C) of x (B, T, C)."""
        x = F.gelu(self.c_fc(x), approximate="tanh")  # as in GPT-2 (Hendrycks and Gimpel 2016)
        x = self.c_proj(x)
        return F.dropout(x, self.dropout, self.training)


class Block(nn.Module):
    """Attention, then an MLP, each added to its input: (B, T, C) -> (B, T, C)."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(
        self, x: torch.Tensor, mask: Mask | None = None, cache: list | None = None
    ) -> torch.Tensor:
        """Return (B, T, C) of x (B, T, C); GPT.forward explains mask and this layer's cache."""
        x = x + self.attn(self.ln_1(x), mask, cache)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """GPT-2 with a language-model head tied to the token embedding."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.transformer: Any = nn.ModuleDict(
            dict(
                wte=nn.Embedding(config.padded_vocab_size, config.n_embd),
                wpe=nn.Embedding(config.n_positions, config.n_embd),
                h=nn.ModuleList(Block(config) for _ in range(config.n_layer)),
                ln_f=nn.LayerNorm(config.n_embd),
            )
        )
        for name, p in self.named_parameters():  # GPT-2's initialization
            if name.endswith("c_proj.weight"):  # two per block add to the residual stream
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layer))
            elif p.dim() == 2:
                nn.init.normal_(p, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def num_parameters(self) -> int:
        """Return the number of parameters, without rows of the embedding for speed alone."""
        padding = self.config.padded_vocab_size - self.config.vocab_size
        return sum(p.numel() for p in self.parameters()) - padding * self.config.n_embd

    def save_pretrained(self, folder: str | Path, tokenizer: Tokenizer | None = None) -> None:
        """Write config.json, generation_config.json and model.safetensors for transformers.

        GPT2LMHeadModel.from_pretrained(folder) then gives the same logits. Rows that the output
        layer has for speed alone are cut off.

        Args:
            folder: Folder to write; created if it does not exist.
            tokenizer: Tokenizer to write, too.

        Raises:
            OSError: The folder cannot be written.
            ValueError: The tokenizer has more ids than the model.
        """
        vocab_size = self.config.vocab_size
        if tokenizer is not None:
            if tokenizer.vocab_size > vocab_size:
                raise ValueError(
                    f"the model has {vocab_size:,} ids, fewer than the {tokenizer.vocab_size:,} of "
                    f"{tokenizer.name}: it was trained with another vocabulary"
                )
            vocab_size = tokenizer.vocab_size
        weights = self.state_dict()
        weights[EMBEDDING] = weights[EMBEDDING][:vocab_size]
        shape = {
            "vocab_size": vocab_size,
            "n_positions": self.config.n_positions,
            "n_layer": self.config.n_layer,
            "n_head": self.config.n_head,
            "n_embd": self.config.n_embd,
            "dropout": self.config.dropout,
        }
        write_model(Path(folder), shape, weights, tokenizer)

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, dropout: float = 0.0, vocab_multiple: int = 1
    ) -> "GPT":
        """Load a GPT-2 in the Hugging Face layout: config.json and model.safetensors.

        Args:
            folder: Folder written by transformers or save_pretrained, or downloaded from the hub.
            dropout: Probability for further training.
            vocab_multiple: See GPTConfig; the rows that are added are zero.

        Raises:
            FileNotFoundError: The folder lacks a file.
            ValueError: The folder has another kind of model, or a damaged file.
        """
        config = GPTConfig(
            **read_shape(Path(folder)), dropout=dropout, vocab_multiple=vocab_multiple
        )
        with torch.device("meta"):  # neither memory nor time for weights that are replaced below
            model = cls(config)
        shapes = {name: tuple(p.shape) for name, p in model.state_dict().items()}
        shapes[EMBEDDING] = (config.vocab_size, config.n_embd)
        weights = read_weights(Path(folder), shapes)
        padding = config.padded_vocab_size - config.vocab_size
        weights[EMBEDDING] = F.pad(weights[EMBEDDING], (0, 0, 0, padding))
        model.load_state_dict(weights, assign=True)
        return model.requires_grad_()

    def flops_per_token(self, sequence_length: int) -> int:
        """Return the FLOPs of training on one token (Chowdhery et al. 2022, appendix B).

        6 per parameter outside the position embedding, and 12 per layer, channel and token of the
        sequence for attention.
        """
        matrices = self.num_parameters() - self.transformer.wpe.weight.numel()
        return 6 * matrices + 12 * self.config.n_layer * self.config.n_embd * sequence_length

    def forward(
        self,
        idx: torch.Tensor,
        targets: torch.Tensor | None = None,
        reduction: str = "mean",
        positions: torch.Tensor | None = None,
        mask: Mask | None = None,
        cache: list[list] | None = None,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Return logits, or the loss if there are targets.

        Without positions and mask, a row is the beginning of one text.

        Args:
            idx: (B, T) token ids, T <= n_positions.
            targets: (B, T) token ids, -100 where there is no target.
            reduction: "mean" or "sum" of the loss over the targets.
            positions: (B, T), from 0 in each document.
            mask: (B, T, T) bool, True at [b, i, j] if token i attends to token j; or a
                BlockMask of flex_attention.
            cache: n_layer lists, empty at first. The first call fills them with keys and values;
                later calls take one token each.

        Returns:
            (logits, None) with logits (B, T, vocab_size); or, with targets, (None, loss), the
            cross-entropy in nats.

        Raises:
            ValueError: The sequence is longer than n_positions.
        """
        T = idx.shape[1]
        start = cache[0][0].shape[2] if cache and cache[0] else 0
        if start + T > self.config.n_positions:
            raise ValueError(
                f"a sequence of {start + T} tokens is longer than the model's "
                f"{self.config.n_positions} positions"
            )
        if positions is None:
            positions = torch.arange(start, start + T, device=idx.device)
        if isinstance(mask, torch.Tensor):
            mask = mask[:, None]  # the same for all heads, and for all layers
        x = self.transformer.wte(idx) + self.transformer.wpe(positions)  # (B, T, C)
        x = F.dropout(x, self.config.dropout, self.training)
        for i, block in enumerate(self.transformer.h):
            x = block(x, mask, cache[i] if cache is not None else None)
        x = self.transformer.ln_f(x)
        if targets is None:
            return self.logits(x)[..., : self.config.vocab_size], None
        return None, self.loss(x.flatten(0, 1), targets.flatten(), reduction)

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """Return (..., padded_vocab_size) of x (..., C); -inf for ids beyond the vocabulary."""
        logits = F.linear(x, self.transformer.wte.weight)
        if self.config.padded_vocab_size > self.config.vocab_size:
            logits[..., self.config.vocab_size :] = -math.inf
        return logits

    def loss(self, x: torch.Tensor, targets: torch.Tensor, reduction: str) -> torch.Tensor:
        """Return the cross-entropy in nats, a 0-d tensor, of x (N, C) and targets (N,)."""
        return F.cross_entropy(self.logits(x).float(), targets, reduction=reduction)

    @torch.inference_mode()
    def generate(
        self,
        idx: torch.Tensor,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        generator: torch.Generator | None = None,
        stop_token: int | None = None,
    ) -> Iterator[torch.Tensor]:
        """Continue token ids, one sampled token at a time.

        While the sequence fits n_positions, each step runs one token through the model, with a
        cache of keys and values. After that, each step runs the last n_positions tokens again,
        since every position has moved.

        Args:
            idx: (B, T) token ids, T >= 1.
            max_new_tokens: Number of steps.
            temperature: See next_token_probs.
            top_k: See next_token_probs.
            top_p: See next_token_probs.
            generator: Random numbers, on the device of idx.
            stop_token: The id that ends a row. A row that has ended repeats it until all rows have
                ended; None: no id ends a row.

        Yields:
            (B,) token ids after each step.
        """
        ended = torch.zeros(len(idx), dtype=torch.bool, device=idx.device)
        cache: list[list] | None = [[] for _ in self.transformer.h]
        new = idx
        for _ in range(max_new_tokens):
            if idx.shape[1] > self.config.n_positions:
                idx = idx[:, -self.config.n_positions :]
                new = idx
                cache = None
            logits, _ = self(new, cache=cache)
            probs = next_token_probs(logits[:, -1], temperature, top_k, top_p)
            new = torch.multinomial(probs, 1, generator=generator)  # (B, 1)
            if stop_token is not None:
                new[ended] = stop_token
                ended = new[:, 0] == stop_token
            idx = torch.cat((idx, new), dim=1)
            yield new[:, 0]
            if stop_token is not None and ended.all():
                return


def next_token_probs(
    logits: torch.Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0
) -> torch.Tensor:
    """Return the probabilities to sample from.

    Example: probabilities [0.4, 0.3, 0.2, 0.1] become [4/7, 3/7, 0, 0] with top_k=2.

    Args:
        logits: (B, vocab_size).
        temperature: Divides the logits; 0 gives the most likely id probability 1.
        top_k: Keep this many of the most likely ids; 0 keeps all.
        top_p: Keep the smallest set of ids with at least this probability (Holtzman et al. 2020).

    Returns:
        (B, vocab_size) float32.
    """
    logits = logits.float()
    if temperature < 1e-5:  # greedy; a division by the temperature would overflow
        return F.one_hot(logits.argmax(-1), logits.shape[-1]).float()
    logits = logits / temperature
    if top_k:
        kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -math.inf)
    probs = logits.softmax(-1)
    if top_p < 1:
        ordered, ids = probs.sort(descending=True)
        sum_before = ordered.cumsum(-1) - ordered
        ordered = ordered.masked_fill(sum_before >= top_p, 0)
        probs = torch.zeros_like(probs).scatter(1, ids, ordered)
    return probs / probs.sum(-1, keepdim=True)
