"""GPT-2, exactly: learned positions, pre-LayerNorm blocks, tanh GELU, tied embeddings.

Radford et al., "Language Models are Unsupervised Multitask Learners" (2019). Parameters carry
the names of OpenAI's release, so that weights can be copied key by key.

    model = GPT(GPTConfig(vocab_size=257, n_layer=4, n_head=4, n_embd=128))
    logits, _ = model(x)                          # x, y: (B, T) token ids
    _, loss = model(x, y)
    for token in model.generate(x[:1], 100):      # (1,) token ids, one at a time
        ...
"""

import dataclasses
import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention.flex_attention import BlockMask, flex_attention

GPT2_SIZES = {  # the four released models: shapes that GPTConfig(**GPT2_SIZES[name]) turns into one
    "gpt2": dict(n_layer=12, n_head=12, n_embd=768),  # 124M parameters
    "gpt2-medium": dict(n_layer=24, n_head=16, n_embd=1024),  # 355M
    "gpt2-large": dict(n_layer=36, n_head=20, n_embd=1280),  # 774M
    "gpt2-xl": dict(n_layer=48, n_head=25, n_embd=1600),  # 1558M
}
EMBEDDING = "transformer.wte.weight"  # and the head's
CHUNKED_LOSS = hasattr(nn, "LinearCrossEntropyOptions")  # torch 2.13 and later
LOGITS = 6_500_000  # at a time, 26 MB on a CPU: glibc keeps blocks of up to 32


@dataclass
class GPTConfig:
    """The shape of a GPT-2. Names follow Hugging Face's GPT2Config.

    Raises ValueError for a shape that cannot be built.
    """

    vocab_size: int = 50257  # token ids
    n_positions: int = 1024  # tokens, the longest window
    n_layer: int = 12  # blocks
    n_head: int = 12  # attention heads a block; divides n_embd
    n_embd: int = 768  # channels
    dropout: float = 0.0  # probability, 0 <= p < 1

    def __post_init__(self):
        for name in ("vocab_size", "n_positions", "n_layer", "n_head", "n_embd"):
            value, most = getattr(self, name), 1000 if name == "n_layer" else 1 << 20
            if type(value) is not int or not 1 <= value <= most:  # it may be a stranger's
                raise ValueError(f"{name} must be a number from 1 to {most:,}, not {value!r:.60}")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd ({self.n_embd}) must be a multiple of n_head ({self.n_head})")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, not {self.dropout}")


class Attention(nn.Module):
    """Causal multi-head self-attention, (B, T, C) -> (B, T, C)."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)  # query, key, value in one
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)
        self.n_head = config.n_head
        self.dropout = config.dropout

    def forward(self, x, mask=None, cache=None):
        B, T, C = x.shape
        q, k, v = (
            part.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
            for part in self.c_attn(x).split(C, dim=2)
        )  # (B, n_head, T, C / n_head)
        causal = mask is None
        if cache is not None:  # a list that is empty or holds the keys and values so far
            if cache:
                assert T == 1, "a second piece of several tokens would need a mask"
                k, v = torch.cat((cache[0], k), dim=2), torch.cat((cache[1], v), dim=2)
                causal = False  # the one new token sees all that came before
            cache[:] = k, v
        if isinstance(mask, BlockMask):
            whole = torch.compiler.is_compiling()  # flex_attention is compiled with all the rest
            attend = flex_attention if whole else compiled_flex_attention()
            y = attend(q, k, v, block_mask=mask)
        else:
            dropout = self.dropout if self.training else 0.0
            y = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=causal)
        y = self.c_proj(y.transpose(1, 2).reshape(B, T, C))
        return F.dropout(y, self.dropout, self.training)


@functools.cache
def compiled_flex_attention():
    """Not compiled, it would make all (B, n_head, T, T) weights at once."""
    return torch.compile(flex_attention)


class MLP(nn.Module):
    """(B, T, C) -> (B, T, C), four times as wide in between."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)
        self.dropout = config.dropout

    def forward(self, x):
        x = self.c_proj(gelu(self.c_fc(x)))
        return F.dropout(x, self.dropout, self.training)


def gelu(x):
    """GELU by its tanh formula, which GPT-2 has (Hendrycks and Gimpel 2016)."""
    eager = not torch.compiler.is_compiling()
    if x.is_cpu and x.dtype == torch.float32 and eager:
        return SigmoidGELU.apply(x)
    return F.gelu(x, approximate="tanh")


class SigmoidGELU(torch.autograd.Function):
    """The same function as x * sigmoid(u), u = C (x + 0.044715 x^3), in two thirds of the time:
    torch's tanh on a CPU takes four times as long as its sigmoid."""

    C = 2 * math.sqrt(2 / math.pi)

    @staticmethod
    def forward(ctx, x):
        C = SigmoidGELU.C
        u = (x * x).mul_(0.044715 * C).add_(C).mul_(x)
        s = torch.sigmoid(u)
        if ctx.needs_input_grad[0]:  # s + x s (1 - s) du/dx, where x du/dx = 3 u - 2 C x
            ctx.save_for_backward(u.mul_(3).sub_(x, alpha=2 * C).mul_(1 - s).add_(1).mul_(s))
        return s.mul_(x)

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.saved_tensors[0]


class Block(nn.Module):
    """(B, T, C) -> (B, T, C): attention, then an MLP, each added to what comes in."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x, mask=None, cache=None):
        x = x + self.attn(self.ln_1(x), mask, cache)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """GPT-2 with a language-model head tied to the token embedding."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict(
            dict(
                wte=nn.Embedding(config.vocab_size, config.n_embd),
                wpe=nn.Embedding(config.n_positions, config.n_embd),
                h=nn.ModuleList(Block(config) for _ in range(config.n_layer)),
                ln_f=nn.LayerNorm(config.n_embd),
            )
        )
        for name, p in self.named_parameters():  # GPT-2's initialisation
            if name.endswith("c_proj.weight"):  # two additions to the residual stream a block
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layer))
            elif p.dim() == 2:
                nn.init.normal_(p, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def num_parameters(self) -> int:
        """Parameters; the head shares the token embedding's and is not counted twice."""
        return sum(p.numel() for p in self.parameters())

    def save_pretrained(self, folder, tokenizer=None) -> None:
        """Writes config.json, generation_config.json and model.safetensors, by which transformers'
        GPT2LMHeadModel loads this model; and the files of `tokenizer`, if one is given, whose
        vocabulary then cuts off rows that are there for speed only.

        Raises OSError, and ValueError for a vocabulary that is larger than the model's.
        """
        from training.huggingface import write_model

        shape, weights = dataclasses.asdict(self.config), self.state_dict()
        if tokenizer is not None:
            if tokenizer.vocab_size > self.config.vocab_size:
                raise ValueError(
                    f"the model has {self.config.vocab_size:,} ids, too few for the "
                    f"{tokenizer.vocab_size:,} of {tokenizer.name}: it learnt another vocabulary"
                )
            shape["vocab_size"] = tokenizer.vocab_size
            weights[EMBEDDING] = weights[EMBEDDING][: tokenizer.vocab_size]
        write_model(Path(folder), shape, weights, tokenizer)

    @classmethod
    def from_pretrained(cls, folder, dropout=0.0) -> "GPT":
        """The model of a folder that has config.json and model.safetensors of a GPT-2, as
        transformers or save_pretrained writes them, or the hub of Hugging Face has them.

        Raises FileNotFoundError, or ValueError for another kind of model or a damaged file.
        """
        from training.huggingface import read_shape, read_weights

        shape = GPTConfig(**read_shape(Path(folder)), dropout=dropout)
        with torch.device("meta"):  # no memory, nor time, for weights that are about to come
            model = cls(shape)
        shapes = {name: tuple(p.shape) for name, p in model.state_dict().items()}
        model.load_state_dict(read_weights(Path(folder), shapes), assign=True)
        return model.requires_grad_()

    def flops_per_token(self, T: int) -> int:
        """Of training on windows of T tokens: 6 a parameter that is in a matrix product, and 12 a
        layer, channel and token of the window for attention (Chowdhery et al. 2022, appendix B)."""
        matrices = self.num_parameters() - self.transformer.wpe.weight.numel()
        return 6 * matrices + 12 * self.config.n_layer * self.config.n_embd * T

    def forward(self, idx, targets=None, reduction="mean", positions=None, mask=None, cache=None):
        """idx: (B, T) token ids, T <= n_positions. targets: (B, T) ids, -100 where there is none.

        Returns (logits, None): (B, T, vocab_size); or, with targets, (None, loss): the
        cross-entropy in nats over the targets that are there, their "mean" or "sum". Without
        positions, (B, T), and mask, which is (B, T, T) bool, true where the second axis sees the
        last, or a BlockMask of flex_attention, a row is one text, read from its start. `cache` is a
        list of n_layer lists, empty at first; the first call fills it, later ones take one token.
        """
        T = idx.shape[1]
        start = cache[0][0].shape[2] if cache and cache[0] else 0
        if start + T > self.config.n_positions:
            raise ValueError(
                f"a window of {start + T} tokens is longer than the model's "
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
        x, head = self.transformer.ln_f(x), self.transformer.wte.weight
        if targets is None:
            return F.linear(x, head), None  # (B, T, vocab_size)
        return None, head_loss(x.flatten(0, 1), head, targets.flatten(), reduction)

    @torch.inference_mode()
    def generate(
        self, idx, max_new_tokens: int, temperature=1.0, top_k=0, top_p=1.0, generator=None
    ) -> Iterator[torch.Tensor]:
        """Continues idx, (B, T) token ids with T >= 1, yielding (B,) ids after each step.

        Up to n_positions tokens each step costs one token, through a cache of keys and values;
        beyond, the last n_positions tokens are run again, since every position has moved.
        """
        cache, new = [[] for _ in self.transformer.h], idx
        for _ in range(max_new_tokens):
            if idx.shape[1] > self.config.n_positions:
                idx = new = idx[:, -self.config.n_positions :]
                cache = None
            logits, _ = self(new, cache=cache)
            probs = next_token_probs(logits[:, -1], temperature, top_k, top_p)
            new = torch.multinomial(probs, 1, generator=generator)  # (B, 1)
            idx = torch.cat((idx, new), dim=1)
            yield new[:, 0]


def head_loss(x, head, targets, reduction):
    """Cross-entropy of the logits that head, (vocab_size, C), makes of x, (N, C); targets: (N,)."""
    large = len(x) * len(head) > LOGITS
    if large and x.is_cpu and CHUNKED_LOSS and not torch.is_autocast_enabled("cpu"):
        compiling = torch.compiler.is_compiling()  # disable() by itself imports the whole compiler
        loss = torch.compiler.disable(chunked_loss) if compiling else chunked_loss
        return loss(x, head, targets, reduction)
    return F.cross_entropy(F.linear(x, head).float(), targets, reduction=reduction)


def chunked_loss(x, head, targets, reduction):
    """head_loss in float32 on a CPU, a few rows at a time: GPT-2's vocabulary makes 150 MB of 768
    tokens, which glibc takes from the kernel, page by page, again at every step (1.5 times slower,
    all told)."""
    rows = max(1, LOGITS // len(head))
    options = nn.LinearCrossEntropyOptions(batch_chunk_size=rows, chunking_method=None)
    return F.linear_cross_entropy(x, head, targets, reduction=reduction, options=options)


def next_token_probs(logits, temperature=1.0, top_k=0, top_p=1.0):
    """(B, vocab_size) logits -> probabilities.

    temperature 0 puts everything on the largest logit; top_k keeps that many ids (0: all); top_p
    keeps the smallest set of ids that holds that much probability (Holtzman et al. 2020).
    """
    logits = logits.float()
    if temperature == 0:
        return F.one_hot(logits.argmax(-1), logits.shape[-1]).float()
    logits = logits / temperature
    if top_k:
        kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -math.inf)
    probs = logits.softmax(-1)
    if top_p < 1:
        ordered, ids = probs.sort(descending=True)
        ordered[ordered.cumsum(-1) - ordered >= top_p] = 0  # the mass before it is already enough
        probs = torch.zeros_like(probs).scatter(1, ids, ordered)
    return probs / probs.sum(-1, keepdim=True)
