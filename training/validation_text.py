"""Which text a run is validated on, and how well a model predicts the beginning of that text."""

import hashlib
from pathlib import Path

import torch

from batches.documents import document_ids, document_mask, document_positions
from batches.tokens import Tokens
from corpus.vocabulary import tokenizer_of
from model import GPT
from training.corpora import TrainingCorpus
from training.scoring import ScoringModel, TokenScores, join_scores

HASHED_BYTES = 1 << 16  # of the text, from its beginning
SCORED_TOKENS = 256  # of the beginning of the text


def describe_val_text(corpora: list[TrainingCorpus]) -> dict | None:
    """Return what identifies the text that a run is validated on, whatever its vocabulary.

    Args:
        corpora: The corpora of the run.

    Returns:
        {"bytes": UTF-8 bytes of the whole text, "sha256": hash of its first 64 KiB without
        end-of-text tokens}; of a mixture, the bytes of all texts and a hash of their hashes and
        shares. None if the vocabulary is not on this machine.
    """
    try:
        texts = [describe_text(corpus.folder / "val", corpus.metadata) for corpus in corpora]
    except (FileNotFoundError, ValueError):
        return None  # open_sampler prints the reason
    if len(texts) == 1:
        return texts[0]
    shares = [f"{corpus.share} {text['sha256']}" for corpus, text in zip(corpora, texts)]
    digest = hashlib.sha256("\n".join(sorted(shares)).encode()).hexdigest()
    return {"bytes": sum(text["bytes"] for text in texts), "sha256": digest}


def describe_text(split: Path, metadata: dict) -> dict:
    """Return what identifies the text of a split, see describe_val_text.

    Args:
        split: The split, such as data/NAME/val.
        metadata: Metadata of the corpus.

    Raises:
        FileNotFoundError: The vocabulary is not on this machine.
        ValueError: The name of the vocabulary stands for another one here.
    """
    tokenizer = tokenizer_of(metadata, split.parent)
    tokens = Tokens(split)
    ids = tokens.read([0], min(len(tokens), HASHED_BYTES))[0]
    text = tokenizer.decode_bytes(ids[ids != metadata["eot_token"]].tolist())
    digest = hashlib.sha256(text[:HASHED_BYTES]).hexdigest()
    return {"bytes": metadata["splits"][split.name]["bytes"], "sha256": digest}


def score_beginning(
    model: GPT, tokens: Tokens, sequence_length: int, eot_token: int, separate_documents: bool
) -> tuple[int, TokenScores]:
    """Return the first token of a split, and the scores of up to SCORED_TOKENS tokens after it.

    The tokens are divided into sequences as in validation.

    Args:
        model: In evaluation mode; not used for anything else afterwards.
        tokens: The split.
        sequence_length: Tokens that the model sees at once.
        eot_token: Id that ends a document.
        separate_documents: Whether documents in one sequence do not attend to each other.
    """
    num_tokens = min(SCORED_TOKENS, len(tokens) - 1)
    ids = torch.from_numpy(tokens.read([0], num_tokens + 1)[0])
    ids = ids.to(model.transformer.wte.weight.device)
    parts: list[TokenScores] = []
    scoring = ScoringModel(model, parts.append, num_tokens)
    with torch.no_grad():
        for start in range(0, num_tokens, sequence_length):
            x = ids[None, start : min(start + sequence_length, num_tokens)]  # (1, T)
            y = ids[None, start + 1 : start + 1 + x.shape[1]]
            mask_kwargs = {}
            if separate_documents:
                doc_ids = document_ids(x, eot_token)
                positions = document_positions(doc_ids)
                mask_kwargs = {"mask": document_mask(doc_ids), "positions": positions}
            scoring(x, y, "sum", **mask_kwargs)
    return int(ids[0]), join_scores(parts)
