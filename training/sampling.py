"""Text that a model writes: for sample.py, and for the sample at the end of a run."""

import itertools
from collections.abc import Iterable, Iterator

import torch

from corpus.tokenizer import Tokenizer
from model import GPT


def prompt_ids(tokenizer: Tokenizer, prompt: str, metadata: dict | None) -> list[int]:
    """Return the token ids to continue, as the model has seen the beginnings of texts in training.

    - After training on documents, a prompt is the beginning of a document, so the end-of-text token
      comes before it. An empty prompt is this token alone.
    - After training on a running text, there is no end-of-text token. An empty prompt is a line
      break.
    - For weights from elsewhere, a prompt is encoded as it is. An empty prompt is the end-of-text
      token.

    Args:
        tokenizer: The tokenizer of the model.
        prompt: The text to continue.
        metadata: Metadata of the corpus that the model was trained on, or None for weights from
            elsewhere.

    Raises:
        ValueError: The vocabulary has no id for the prompt, and there is no end-of-text token to
            begin with.
    """
    if metadata and not metadata["eot_per_document"]:
        ids = tokenizer.encode(prompt or "\n").tolist()
        if not ids:
            raise ValueError(
                f"{tokenizer.name} has no id for the prompt {prompt or chr(10)!r}: choose another "
                f"--prompt"
            )
        return ids
    ids = tokenizer.encode(prompt).tolist()
    return [tokenizer.eot_token, *ids] if metadata or not ids else ids


def continue_prompt(
    model: GPT,
    ids: list[int],
    eot_token: int,
    *,
    max_new_tokens: int,
    num_samples: int = 1,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
) -> Iterator[torch.Tensor]:
    """Yield the token ids that continue a prompt, one step after another, until all samples end.

    A sample ends with an end-of-text token: no text is written after another document, in a context
    that training never had.

    Args:
        model: In evaluation mode.
        ids: Token ids of the prompt, from prompt_ids.
        eot_token: The end-of-text token, which ends a sample.
        max_new_tokens: Largest number of steps.
        num_samples: Number of samples.
        temperature: See model.next_token_probs.
        top_k: See model.next_token_probs.
        top_p: See model.next_token_probs.
        generator: Random numbers, on the device of the model.

    Yields:
        (num_samples,) token ids. A sample that has ended repeats the end-of-text token.
    """
    device = model.transformer.wte.weight.device
    idx = torch.tensor(ids).expand(num_samples, -1).to(device)  # (B, T)
    yield from model.generate(idx, max_new_tokens, temperature, top_k, top_p, generator, eot_token)


def until_end(ids: Iterable[int], eot_token: int) -> Iterator[int]:
    """Yield the ids before the first end-of-text token.

    Example: [5, 6, EOT, EOT] -> 5, 6.
    """
    return itertools.takewhile(lambda token: token != eot_token, ids)
