"""The mask of flex_attention between documents: ours beside torch's create_block_mask.

    python -m bench.block_mask

Both functions make the mask for the same batch, on one thread, and the masks must be equal. The
first call of each function is not counted.
"""

import functools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from batches.block_mask import document_block_mask
from batches.documents import document_ids
from bench.report import table, write
from common.script import run_script
from common.settings import check_ranges, parse_settings

EOT_SHARE = 1 / 300  # share of end-of-text tokens: documents have 300 tokens on average


@dataclass
class Settings:
    batch_size: int = 16  # sequences in the batch
    sequence_length: int = 1024  # tokens per sequence
    rounds: int = 20  # calls of each function
    device: str = "cpu"  # device of the document ids: cpu, cuda
    results: str = ""  # Markdown file to write into; "": print only


RANGES = {"batch_size": (1, 4096), "sequence_length": (1, 1 << 16), "rounds": (1, 10_000)}


def main() -> None:
    settings = parse_settings(Settings, __doc__)
    check_ranges(settings, RANGES)
    torch.set_num_threads(1)
    shape = (settings.batch_size, settings.sequence_length)
    generator = torch.Generator().manual_seed(0)
    ends = torch.rand(shape, generator=generator) < EOT_SHARE
    doc_ids = document_ids(ends, eot_token=1).to(settings.device)
    functions = {
        "document_block_mask": functools.partial(document_block_mask, doc_ids),
        "create_block_mask": functools.partial(by_all_pairs, doc_ids),
    }
    masks = [function() for function in functions.values()]
    if not torch.equal(masks[0].to_dense(), masks[1].to_dense()):
        raise AssertionError("the two masks differ")
    rows = []
    for name, function in functions.items():
        times = [milliseconds(function, settings.device) for _ in range(settings.rounds)]
        rows.append((name, statistics.median(times), min(times), max(times)))
    text = (
        f"The mask of {settings.batch_size} x {settings.sequence_length} document ids on "
        f"{settings.device}, one thread, {settings.rounds} calls.\n\n"
        + table(["", "ms, median", "min", "max"], rows)
    )
    write(settings.results, "Block mask", text)


def by_all_pairs(doc_ids: torch.Tensor) -> BlockMask:
    """Return the mask that torch's create_block_mask makes from all pairs of tokens."""
    B, T = doc_ids.shape

    def may_attend(b, h, query, key):
        return (query >= key) & (doc_ids[b, query] == doc_ids[b, key])

    return create_block_mask(may_attend, B, None, T, T, device=doc_ids.device)


def milliseconds(function: Callable, device: str) -> float:
    """Return the milliseconds that one call takes."""
    start = time.perf_counter()
    function()
    if device == "cuda":
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start)


if __name__ == "__main__":
    run_script(main)
