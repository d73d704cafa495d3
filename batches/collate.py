"""Other forms of the windows of a TextDataset: collate functions for a DataLoader.

    DataLoader(dataset, batch_size=8, collate_fn=collate_huggingface)
    collate = functools.partial(collate_documents, eot_token=50256)
    DataLoader(dataset, batch_size=8, collate_fn=collate)

Each function takes the list of (x, y) that a DataLoader with a batch_size collects. pad_documents
(documents.py) is the collate function for whole documents.
"""

from collections.abc import Sequence

import torch

from batches.documents import document_ids, document_mask

Windows = Sequence[tuple[torch.Tensor, torch.Tensor]]


def collate_huggingface(windows: Windows) -> dict[str, torch.Tensor]:
    """Collate windows to a batch for Hugging Face models, which shift the labels themselves.

    Example: x=[5, 6, 7], y=[6, 7, 8] -> input_ids [[5, 6, 7]], labels [[5, 6, 7]].

    Args:
        windows: B pairs (x, y) of (T,) int64 tensors.

    Returns:
        A dict of input_ids and labels, (B, T) int64 each. Labels are the text without token noise,
        except the first label of a row: it is x[0], and no model is trained on it.
    """
    input_ids = torch.stack([x for x, _ in windows])
    targets = torch.stack([y for _, y in windows])
    labels = torch.cat([input_ids[:, :1], targets[:, :-1]], dim=1)
    return {"input_ids": input_ids, "labels": labels}


def collate_documents(windows: Windows, eot_token: int) -> dict[str, torch.Tensor]:
    """Collate windows to a batch with the document of each token and the mask between documents.

    Example: x=[5, EOT, 7] -> token_ids [[5, EOT, 7]], document_ids [[0, 1, 1]], and document_mask
    [[[1, 0, 0], [0, 1, 0], [0, 1, 1]]].

    Args:
        windows: B pairs (x, y) of (T,) int64 tensors.
        eot_token: Id of the end-of-text token.

    Returns:
        A dict of token_ids and document_ids, (B, T) int64 each, and document_mask, (B, T, T) bool.
    """
    token_ids = torch.stack([x for x, _ in windows])
    doc_ids = document_ids(token_ids, eot_token)
    return {
        "token_ids": token_ids,
        "document_ids": doc_ids,
        "document_mask": document_mask(doc_ids),
    }
