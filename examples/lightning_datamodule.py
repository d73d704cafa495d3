"""Our batches in a Lightning Trainer: WikiText-2, padded to each batch's longest or packed.

    pip install lightning transformers
    python examples/lightning_datamodule.py --max_steps 200 --packing

The module is LLMDataModule; the model below it is transformers' GPT-2, small and from scratch.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run from anywhere

import lightning as L
import torch
from torch.utils.data import DataLoader

from common.script import run
from common.settings import parse_settings
from corpus.inputs import load_corpus
from corpus.shards import prepare
from corpus.tasks import engine
from corpus.tokenizer import fetch_vocabulary, get_tokenizer
from dataset import DocumentDataset, ShuffledBatches, pack_documents, pad_documents, read_metadata


class LLMDataModule(L.LightningDataModule):
    """Batches of documents as dicts of (B, T) int64 tensors: input_ids and labels (which the model
    shifts), with attention_mask where rows are padded to the batch's longest, or position_ids and
    document_ids where documents are packed into rows of max_length.

    corpus: known to prepare_data.py, or of files of yours (inputs). Padded documents are cut at
    max_length tokens and come with others of similar length. The order is shared out among
    processes here: give the Trainer use_distributed_sampler=False.
    """

    def __init__(
        self, corpus="wikitext-2", tokenizer="gpt2", batch_size=32, max_length=128, packing=False,
        data_dir="data", inputs=(), seed=0, num_workers=0,
    ):  # fmt: skip
        super().__init__()
        self.save_hyperparameters()
        self.folder = Path(data_dir) / corpus
        self.splits = {}

    def prepare_data(self):  # once a node
        hp = self.hparams
        fetch_vocabulary(hp.tokenizer)
        corpus = load_corpus(hp.corpus, self.folder, hp.inputs)
        with engine("processes") as run_tasks:
            prepare(corpus, get_tokenizer(hp.tokenizer), self.folder, run_tasks, seed=hp.seed)

    def setup(self, stage=None):
        hp, there = self.hparams, read_metadata(self.folder)["splits"]
        wanted = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",)}
        for name in wanted.get(stage, ("train", "val", "test")):
            if name in there:
                cut = None if hp.packing else hp.max_length
                documents = DocumentDataset(self.folder / name, cut)
                rows = pack_documents(documents, hp.max_length) if hp.packing else documents
                self.splits[name] = rows

    def loader(self, name):
        hp, rows = self.hparams, self.splits[name]
        options = dict(
            collate_fn=None if hp.packing else pad_documents,
            num_workers=hp.num_workers,
            persistent_workers=hp.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
        )
        if name != "train":
            return DataLoader(rows, hp.batch_size, **options)
        joined = torch.distributed.is_available() and torch.distributed.is_initialized()
        world_size = torch.distributed.get_world_size() if joined else 1
        order = ShuffledBatches(
            len(rows), hp.batch_size * world_size, hp.seed,
            rank=torch.distributed.get_rank() if joined else 0, world_size=world_size,
            lengths=getattr(rows, "lengths", None),
        )  # fmt: skip
        return DataLoader(rows, batch_sampler=order, **options)

    def train_dataloader(self):
        return self.loader("train")

    def val_dataloader(self):
        return self.loader("val")

    def test_dataloader(self):
        return self.loader("test")


class LitGPT2(L.LightningModule):
    """transformers' GPT-2 on batches of LLMDataModule's."""

    def __init__(self, vocab_size=50257, n_positions=128, n_layer=4, n_head=4, n_embd=128, lr=1e-3):
        super().__init__()
        self.save_hyperparameters()
        from transformers import GPT2Config, GPT2LMHeadModel

        shape = dict(n_positions=n_positions, n_layer=n_layer, n_head=n_head, n_embd=n_embd)
        self.model = GPT2LMHeadModel(GPT2Config(vocab_size=vocab_size, **shape))

    def loss(self, batch):
        batch = {name: rows for name, rows in batch.items() if name != "document_ids"}
        # with a cache, which a loss has no use for, it would take a packed row for one document
        return self.model(**batch, use_cache=False).loss

    def training_step(self, batch, _):
        loss = self.loss(batch)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch, _):
        self.log("val_loss", self.loss(batch), prog_bar=True, batch_size=len(batch["labels"]))

    def test_step(self, batch, _):
        self.log("test_loss", self.loss(batch), batch_size=len(batch["labels"]))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=self.hparams.lr)


@dataclass
class Settings:
    corpus: str = "wikitext-2"  # of prepare_data.py's
    inputs: tuple[str, ...] = ()  # files of yours instead
    data_dir: str = "data"  # folder of prepared corpora
    tokenizer: str = "gpt2"  # of prepare_data.py's
    batch_size: int = 8  # rows
    max_length: int = 128  # tokens a row
    packing: bool = False  # pack documents into rows instead of padding them
    max_steps: int = 200  # optimizer steps


def main():
    config = parse_settings(Settings, __doc__)
    data = LLMDataModule(
        config.corpus, config.tokenizer, config.batch_size, config.max_length,
        config.packing, config.data_dir, config.inputs,
    )  # fmt: skip
    data.prepare_data()
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))  # a look at the first one
    text = get_tokenizer(config.tokenizer).decode(batch["input_ids"][0].tolist())
    print({name: tuple(rows.shape) for name, rows in batch.items()}, repr(text[:200]), sep="\n")
    vocab_size = read_metadata(data.folder)["vocab_size"]
    model = LitGPT2(vocab_size, n_positions=config.max_length)
    trainer = L.Trainer(
        max_steps=config.max_steps, logger=False, enable_checkpointing=False,
        use_distributed_sampler=False,  # ours shares the rows out
    )  # fmt: skip
    trainer.fit(model, data)
    if "test" in read_metadata(data.folder)["splits"]:
        trainer.test(model, data)


if __name__ == "__main__":
    run(main)
