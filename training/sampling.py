"""Text that a model writes: for sample.py, and for the samples of a run."""

import itertools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch

from corpus.tokenizer import Tokenizer
from corpus.vocabulary import tokenizer_of
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


def write_text(
    model: GPT,
    tokenizer: Tokenizer,
    prompt: list[int],
    num_tokens: int,
    generator: torch.Generator | None = None,
) -> str:
    """Return about `num_tokens` tokens that a model writes, as text.

    Short documents are sampled one after another, each for itself, until they have enough tokens.

    Args:
        model: In evaluation mode.
        tokenizer: The tokenizer of the model.
        prompt: Token ids that each text continues, from prompt_ids.
        num_tokens: Tokens of all texts together.
        generator: Random numbers, on the device of the model; None: torch's own.
    """
    texts = []
    num_left = num_tokens
    while num_left > 0:
        tokens = continue_prompt(
            model,
            prompt,
            tokenizer.eot_token,
            max_new_tokens=num_left,
            temperature=0.8,
            top_k=50,
            generator=generator,
        )
        ids = list(until_end(map(int, tokens), tokenizer.eot_token))
        texts.append(tokenizer.decode(ids))
        num_left -= len(ids) + 1
    return "\n---\n".join(texts)


def open_sampler(
    run_dir: Path, metadata: dict, num_tokens: int, seed: int | None = None
) -> Callable[[GPT], str] | None:
    """Return a function that returns a text by a model, or print why there is none.

    Texts begin as in training. There are none if the corpus's vocabulary is not on this machine,
    is another one here, or has no line break for the prompt.

    Args:
        run_dir: Folder of the run, for the line.
        metadata: Metadata of the corpus.
        num_tokens: Tokens of a text.
        seed: Seed of the random numbers, the same for each text, so that only the model makes a
            difference; None: torch's own generator.
    """
    try:
        tokenizer = tokenizer_of(metadata, run_dir)
        prompt = prompt_ids(tokenizer, "", metadata)
    except (FileNotFoundError, ValueError) as error:
        print(f"no samples: {error}")
        return None

    def sample(model: GPT) -> str:
        generator = None
        if seed is not None:
            device = model.transformer.wte.weight.device
            generator = torch.Generator(device).manual_seed(seed)
        return write_text(model, tokenizer, prompt, num_tokens, generator)

    return sample
