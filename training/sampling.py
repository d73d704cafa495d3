"""Text that continues a prompt: for sample.py, and for the sample at the end of a run."""

from collections.abc import Iterator

import torch

from corpus.tokenizer import Tokenizer
from model import GPT


def continue_prompt(
    model: GPT,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    max_new_tokens: int,
    num_samples: int = 1,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
) -> Iterator[torch.Tensor]:
    """Yield the token ids that continue a prompt, one step after another.

    A prompt without ids, such as an empty one, begins a document: it is read as the end of another.

    Args:
        model: In evaluation mode.
        tokenizer: The tokenizer of the corpus that the model was trained on.
        prompt: The text to continue.
        max_new_tokens: Number of steps.
        num_samples: Number of continuations.
        temperature: See model.next_token_probs.
        top_k: See model.next_token_probs.
        top_p: See model.next_token_probs.
        generator: Random numbers, on the device of the model.

    Yields:
        (num_samples,) token ids.
    """
    ids = tokenizer.encode(prompt).tolist() or [tokenizer.eot_token]
    device = model.transformer.wte.weight.device
    idx = torch.tensor(ids).expand(num_samples, -1).to(device)  # (B, T)
    return model.generate(idx, max_new_tokens, temperature, top_k, top_p, generator)
