"""Our batches in a Lightning Trainer: documents of WikiText-2, padded or packed.

    pip install lightning transformers
    python examples/lightning_datamodule.py --max_steps 200 --packing

LLMDataModule prepares the corpus and makes the batches. The model is a small GPT-2 of transformers,
trained from scratch.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run from anywhere

import lightning as L
import torch
from torch.utils.data import DataLoader

from common.script import run_script
from common.settings import parse_settings
from corpus.engines import open_engine
from corpus.inputs import load_corpus
from corpus.pipeline import prepare
from corpus.tokenizer import get_tokenizer
from corpus.vocabulary_files import fetch_vocabulary
from dataset import (
    DocumentDataset,
    ShuffledBatches,
    SimilarLengthBatches,
    pack_documents,
    pad_documents,
    read_metadata,
)


class LLMDataModule(L.LightningDataModule):
    """Batches of documents as dicts of (B, T) int64 tensors.

    - Padded: input_ids, attention_mask and labels. Documents are cut at max_length tokens, and the
      documents of a batch have similar lengths. T is the length of the longest document.
    - Packed: input_ids, labels, position_ids and document_ids. T is max_length.
    - Labels are not shifted: the model shifts them.
    - The samplers divide batches over processes: use Trainer(use_distributed_sampler=False).

    Args:
        corpus: Name of a corpus in the catalog of prepare_data.py, or a name for your files
            (inputs).
        tokenizer: Tokenizer, as for prepare_data.py.
        batch_size: Rows per batch and process.
        max_length: Largest number of tokens per row.
        packing: Whether documents are packed into rows instead of padded.
        data_dir: Folder of prepared corpora.
        inputs: Your files, as for prepare_data.py --input; (): the corpus of the catalog.
        seed: Seed of splits and order.
        num_workers: Worker processes of each loader.
    """

    def __init__(
        self,
        corpus: str = "wikitext-2",
        tokenizer: str = "gpt2",
        batch_size: int = 32,
        max_length: int = 128,
        packing: bool = False,
        data_dir: str | Path = "data",
        inputs: tuple[str, ...] = (),
        seed: int = 0,
        num_workers: int = 0,
    ):
        super().__init__()
        self.save_hyperparameters()
        self.folder = Path(data_dir) / corpus
        self.splits = {}

    def prepare_data(self) -> None:
        """Prepare the corpus; Lightning calls this once per node."""
        hp = self.hparams
        fetch_vocabulary(hp.tokenizer)
        corpus = load_corpus(hp.corpus, self.folder, hp.inputs)
        with open_engine("processes") as run_tasks:
            prepare(corpus, get_tokenizer(hp.tokenizer), self.folder, run_tasks, seed=hp.seed)

    def setup(self, stage: str | None = None) -> None:
        """Open the splits that a stage needs.

        Args:
            stage: "fit", "validate", "test", or None for all splits.
        """
        hp = self.hparams
        splits_of_stages = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",)}
        existing = read_metadata(self.folder)["splits"]
        for name in splits_of_stages.get(stage, ("train", "val", "test")):
            if name not in existing:
                continue
            if hp.packing:
                documents = DocumentDataset(self.folder / name)
                self.splits[name] = pack_documents(documents, hp.max_length)
            else:
                self.splits[name] = DocumentDataset(self.folder / name, hp.max_length)

    def loader(self, name: str) -> DataLoader:
        """Return the loader of a split: "train", "val" or "test"."""
        hp = self.hparams
        rows = self.splits[name]
        options = {
            "collate_fn": None if hp.packing else pad_documents,
            "num_workers": hp.num_workers,
            "persistent_workers": hp.num_workers > 0,
            "pin_memory": self.uses_cuda(),
        }
        if name != "train":
            return DataLoader(rows, hp.batch_size, **options)
        rank = 0
        world_size = 1
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            rank = torch.distributed.get_rank()
            world_size = torch.distributed.get_world_size()
        batch_size = hp.batch_size * world_size
        ranks = {"rank": rank, "world_size": world_size}
        if hp.packing:
            order = ShuffledBatches(len(rows), batch_size, hp.seed, **ranks)
        else:
            order = SimilarLengthBatches(rows.lengths, batch_size, hp.seed, **ranks)
        return DataLoader(rows, batch_sampler=order, **options)

    def uses_cuda(self) -> bool:
        """Return whether a Trainer is attached that trains on CUDA."""
        return self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"

    def train_dataloader(self) -> DataLoader:
        """Return the loader of train, in shuffled order."""
        return self.loader("train")

    def val_dataloader(self) -> DataLoader:
        """Return the loader of val, in order."""
        return self.loader("val")

    def test_dataloader(self) -> DataLoader:
        """Return the loader of test, in order."""
        return self.loader("test")


class LitGPT2(L.LightningModule):
    """GPT-2 of transformers, trained on the batches of LLMDataModule.

    Args:
        vocab_size: Size of the vocabulary.
        n_positions: Largest number of tokens per row.
        n_layer: Number of transformer blocks.
        n_head: Number of attention heads.
        n_embd: Number of channels.
        lr: Learning rate of AdamW.
    """

    def __init__(
        self,
        vocab_size: int = 50257,
        n_positions: int = 128,
        n_layer: int = 4,
        n_head: int = 4,
        n_embd: int = 128,
        lr: float = 1e-3,
    ):
        super().__init__()
        self.save_hyperparameters()
        from transformers import GPT2Config, GPT2LMHeadModel

        config = GPT2Config(
            vocab_size=vocab_size,
            n_positions=n_positions,
            n_layer=n_layer,
            n_head=n_head,
            n_embd=n_embd,
        )
        self.model = GPT2LMHeadModel(config)

    def loss(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return the mean loss of a batch."""
        batch = {name: rows for name, rows in batch.items() if name != "document_ids"}
        # With a cache, transformers would treat a packed row as one document.
        return self.model(**batch, use_cache=False).loss

    def training_step(self, batch: dict[str, torch.Tensor], _) -> torch.Tensor:
        """Log and return the loss of a training batch."""
        loss = self.loss(batch)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: dict[str, torch.Tensor], _) -> None:
        """Log the loss of a validation batch."""
        self.log("val_loss", self.loss(batch), prog_bar=True, batch_size=num_targets(batch))

    def test_step(self, batch: dict[str, torch.Tensor], _) -> None:
        """Log the loss of a test batch."""
        self.log("test_loss", self.loss(batch), batch_size=num_targets(batch))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return AdamW over all parameters, without decay: by default, norms would have it, too."""
        return torch.optim.AdamW(self.parameters(), lr=self.hparams.lr, weight_decay=0.0)


def num_targets(batch: dict[str, torch.Tensor]) -> int:
    """Return the number of tokens of a batch that have a loss.

    Lightning weights the loss of a batch with it, so that the mean is over tokens. With the number
    of rows, a token of a short document would count more than one of a long document.
    """
    return int((batch["labels"][:, 1:] != -100).sum())


@dataclass
class Settings:
    corpus: str = "wikitext-2"  # corpus in the catalog of prepare_data.py
    inputs: tuple[str, ...] = ()  # your files, in place of a corpus in the catalog
    data_dir: str = "data"  # folder of prepared corpora
    tokenizer: str = "gpt2"  # tokenizer of prepare_data.py
    batch_size: int = 8  # rows per batch
    max_length: int = 128  # largest number of tokens per row
    packing: bool = False  # pack documents into rows instead of padding them
    max_steps: int = 200  # optimizer steps


def main() -> None:
    """Print a batch, then train a small GPT-2 of transformers and test it."""
    settings = parse_settings(Settings, __doc__)
    data = LLMDataModule(
        settings.corpus,
        settings.tokenizer,
        settings.batch_size,
        settings.max_length,
        settings.packing,
        settings.data_dir,
        settings.inputs,
    )
    data.prepare_data()
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    text = get_tokenizer(settings.tokenizer).decode(batch["input_ids"][0].tolist())
    print({name: tuple(rows.shape) for name, rows in batch.items()})
    print(repr(text[:200]))
    vocab_size = read_metadata(data.folder)["vocab_size"]
    model = LitGPT2(vocab_size, n_positions=settings.max_length)
    trainer = L.Trainer(
        max_steps=settings.max_steps,
        logger=False,
        enable_checkpointing=False,
        use_distributed_sampler=False,  # the samplers of LLMDataModule divide the batches
    )
    trainer.fit(model, data)
    if "test" in read_metadata(data.folder)["splits"]:
        trainer.test(model, data)


if __name__ == "__main__":
    run_script(main)
