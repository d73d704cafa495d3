"""The real training, validation, checkpoint and sampling code on a GPU that computes nothing.

Fake tensors on cuda:0 have shapes, types and devices, and no values. An operation whose tensors lie
on different devices raises as it does on a GPU. So does a device without an index, a random
generator of another device, and an optimizer whose state lies elsewhere. The last tests plant each
of these faults once.
"""

import contextlib
import dataclasses
import sys
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from conftest import TINY, losses, make_corpus
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.nn.attention.flex_attention import flex_attention
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import sample
import train_gpt2
from model import GPT, GPTConfig
from training.checkpoint import load_checkpoint
from training.device import choose_device
from training.models import load_model
from training.optimizer import create_optimizer
from training.report_page import write_report_page

CUDA = torch.device("cuda", 0)
FLEX = "torch.nn.attention.flex_attention"


class Generator(torch.Generator):
    """A CPU generator that stands for a generator of another device.

    A CPU build has no other generators. Operations get a copy of the generator, and the seed of
    the copy identifies the device.
    """

    device_of_seed: ClassVar = {}

    def __new__(cls, device="cpu"):
        self = super().__new__(cls, "cpu")
        self.fake_device = torch.device(device)
        return self.manual_seed(0)

    def manual_seed(self, seed):
        super().manual_seed(seed + 1000 * (len(self.device_of_seed) + 1))
        self.device_of_seed[self.initial_seed()] = self.fake_device
        return self


class Values(TorchDispatchMode):
    """Let fake tensors become ones on the CPU, be pinned, and check the device of a generator.

    Args:
        fake_mode: The mode of the fake tensors.
        has_float64: Whether the device has float64, unlike an Apple GPU.
    """

    supports_higher_order_operators = True  # flex_attention is such an operator

    def __init__(self, fake_mode, has_float64=True):
        super().__init__()
        self.fake_mode = fake_mode
        self.has_float64 = has_float64

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is torch.ops.aten._to_copy.default:  # a real copy would need a GPU
            target = kwargs.get("device") or args[0].device
            is_float64 = kwargs.get("dtype") == torch.float64 and target.type != "cpu"
            if is_float64 and not self.has_float64:
                raise TypeError(f"{target} has no float64")
            if isinstance(args[0], FakeTensor) and target.type == "cpu" != args[0].device.type:
                with unset_fake_temporarily():
                    return torch.ones(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
            if target.type != "cpu":
                if not isinstance(args[0], FakeTensor):
                    args = (self.fake_mode.from_tensor(args[0]), *args[1:])
                args[0].constant = None
        # in inference mode, item arrives as itself
        is_item = func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.item.default)
        if is_item and isinstance(args[0], FakeTensor):
            return 1.0 if args[0].is_floating_point() else 1
        if func is torch.ops.aten.is_nonzero.default and isinstance(args[0], FakeTensor):
            return False  # no text has ended, for example
        if func is torch.ops.aten._pin_memory.default:
            return args[0]
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        if tensors and not any(isinstance(x, FakeTensor) for x in tensors):
            with unset_fake_temporarily():  # real tensors keep their values
                return func(*args, **kwargs)
        generator = kwargs.pop("generator", None)
        device = generator and Generator.device_of_seed.get(generator.initial_seed())
        if device and device != args[0].device:
            raise RuntimeError(f"a generator on {device} for a tensor on {args[0].device}")
        return func(*args, **kwargs)


@pytest.fixture
def fake_cuda(driver, monkeypatch):
    """A context manager that makes cuda:0 exist with fake tensors."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:  # without a GPU, the first entry installs a device guard that does nothing
        pass
    driver(gpus=1)
    monkeypatch.setattr(torch, "Generator", Generator)
    # the C library's generators, which a CPU build cannot make
    monkeypatch.setattr(torch.cuda, "default_generators", (Generator(CUDA),), raising=False)

    @contextlib.contextmanager
    def fake_cuda(has_float64=True):
        with mode, Values(mode, has_float64):
            yield

    return fake_cuda


@pytest.fixture
def run_on_fake_cuda(fake_cuda, rhyme, tmp_path, monkeypatch):
    """A function that trains two steps and returns the checkpoints by name."""
    monkeypatch.chdir(tmp_path)
    create_model = train_gpt2.create_model
    saved = {}

    def create_real(*args):
        with unset_fake_temporarily():  # a fake module cannot move to another device
            return create_model(*args)

    def keep(path, checkpoint):  # fake tensors have no bytes to save
        saved[path.name] = checkpoint

    repeat = train_gpt2.repeat

    def repeat_real(loader):
        batches = repeat(loader)
        while True:
            with unset_fake_temporarily():
                batch = next(batches)
            yield batch

    monkeypatch.setattr("training.metrics.VALIDATION_SAMPLE", 4)  # each token is slow
    monkeypatch.setattr(train_gpt2, "repeat", repeat_real)
    monkeypatch.setattr(train_gpt2, "create_model", create_real)
    monkeypatch.setattr("training.checkpoint.save_checkpoint", keep)
    monkeypatch.setattr(
        train_gpt2, "print_report", lambda *args: None
    )  # the report reads a checkpoint

    def run(**flags):
        # each operation costs the same at any size: few long sequences keep validation short
        size = {"max_steps": 2, "eval_every": 1, "n_embd": 32, "sequence_length": 64}
        flags = TINY | size | flags
        flags |= {"device": "cuda", "compile": "false"}
        argv = [str(part) for name, value in flags.items() for part in (f"--{name}", value)]
        monkeypatch.setattr(sys, "argv", ["train_gpt2.py", *argv])
        with fake_cuda():
            assert train_gpt2.main() == 0
        return saved

    return run


def tensors_of(value):
    """Yield all tensors in nested dicts, lists and tuples."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from tensors_of(part)
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from tensors_of(part)


@pytest.mark.parametrize(
    "flags",
    [
        {"dtype": "bfloat16"},
        {"dtype": "float32", "optimizer": "adamw", "grad_clip": 0},
        {"dtype": "float16"},
        {"dtype": "bfloat16", "dropout": 0.2, "micro_batch_size": 2, "token_noise": 0.1},
        {"dtype": "bfloat16", "corpus": "documents"},
        {"dtype": "float16", "corpus": "documents", "dropout": 0.2, "micro_batch_size": 1},
    ],
    ids=lambda flags: ",".join(map(str, flags.values())),
)
def test_training_keeps_its_tensors_on_the_gpu(run_on_fake_cuda, tmp_path, flags):
    """Weights and optimizer states lie on the GPU during steps, validations and checkpoints."""
    make_corpus(tmp_path / "data/documents", ["one for sorrow", "two for mirth"] * 99, True)
    saved = run_on_fake_cuda(**{"corpus": "rhyme"} | flags)
    assert sorted(saved) == ["best.pt", "last.pt"]
    last = saved["last.pt"]
    assert last["step"] == 2 and last["best"]["step"] == 1
    assert all(weight.device == CUDA for weight in last["model"].values())
    assert last["model"]["transformer.wte.weight"].shape[0] == 320  # 257, padded
    assert last["chosen"]["device"] == "cuda" and last["chosen"]["dtype"] == flags["dtype"]
    for state in last["optimizers"]:
        assert all(t.device == CUDA for t in tensors_of(state) if t.dim())
    assert bool(last["scaler"]) == (flags["dtype"] == "float16")
    corpus = flags.get("corpus", "rhyme")
    assert list(losses(tmp_path / f"out/{corpus}-small-1")) == [1, 2]


def test_pretrained_weights_are_padded(run_on_fake_cuda, tmp_path, rhyme):
    model = GPT(GPTConfig(vocab_size=257, n_positions=64, n_layer=2, n_head=2, n_embd=32))
    model.save_pretrained(tmp_path / "weights")
    shape = {"n_layer": 2, "n_head": 2, "init_from": "weights", "dropout": 0}
    saved = run_on_fake_cuda(dtype="bfloat16", **shape)
    assert saved["last.pt"]["model"]["transformer.wte.weight"].shape == (320, 32)
    assert saved["last.pt"]["model_config"]["vocab_size"] == 257


def test_both_masks_train_on_the_gpu(fake_cuda, monkeypatch):
    """flex_attention and the dense mask separate documents, and both have gradients."""
    model = GPT(GPTConfig(vocab_size=31, n_positions=256, n_layer=1, n_head=2, n_embd=32))
    monkeypatch.setattr("model.compiled_flex_attention", lambda: flex_attention)
    monkeypatch.setattr(
        f"{FLEX}._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True
    )  # no compilation inside
    x, y = torch.randint(31, (2, 256)), torch.randint(31, (2, 256))
    with fake_cuda():
        model = model.to(CUDA)
        for flex in (True, False):
            compute = choices(flex_attention=flex)
            loss = train_gpt2.compute_loss(model, x, y, compute)
            loss.backward()
            assert loss.device == CUDA
            assert all(p.grad.device == CUDA for p in model.parameters())


def choices(**changes):
    values = dict(
        device=CUDA, dtype=torch.bfloat16, compile=False, micro_batch_size=4,
        separate_documents=True, flex_attention=False, eot_token=30, flops_per_token=1, peak=None,
        lines=(),
    )  # fmt: skip
    return train_gpt2.ComputeChoices(**values | changes)


def test_sampling_runs_on_the_gpu(fake_cuda, train, monkeypatch, capsys):
    """sample.py uses the cache and generates beyond the last position."""
    train(max_steps=2)
    capsys.readouterr()
    flags = ["--device", "cuda", "--max_new_tokens", "40", "--num_samples", "3", "--top_p", "0.9"]
    monkeypatch.setattr(sys, "argv", ["sample.py", *flags])
    load_model = sample.load_model

    def load_real(checkpoint, device):
        with unset_fake_temporarily():
            model = load_model(checkpoint, "cpu")
        return model.to(device)

    monkeypatch.setattr(sample, "load_model", load_real)
    with fake_cuda():
        sample.main()
    assert capsys.readouterr().out.count("---") == 3


def test_scores_and_the_page_of_a_run_are_computed_on_the_gpu(fake_cuda, train, monkeypatch):
    """sample.py --score --show, and report.html; also without float64, as on an Apple GPU."""
    make_corpus(Path("data/documents"), ["one for sorrow", "two for mirth"] * 99, True)
    folder = train(corpus="documents", max_steps=2)
    Path("my.jsonl").write_text('{"text": "three for a girl"}\n' * 9)
    flags = ["--device", "cuda", "--score", "my.jsonl", "--show"]
    monkeypatch.setattr(sys, "argv", ["sample.py", *flags])
    checkpoint = load_checkpoint(folder / "best.pt")
    model = load_model(checkpoint)
    monkeypatch.setattr(sample, "load_model", lambda checkpoint, device: model.to(device))
    with fake_cuda(has_float64=False):
        sample.main()
    assert "nats per token" in (folder / "score.html").read_text()
    model = load_model(checkpoint)
    with fake_cuda(has_float64=False):
        write_report_page(folder, checkpoint, model.to(CUDA))
    assert "cannot be scored" not in (folder / "report.html").read_text()


def test_a_checkpoint_of_a_gpu_resumes_on_a_cpu_and_back(train, driver, tmp_path):
    """A setting "auto" is resolved again on another type of device, and kept on the same type."""
    folder = train(max_steps=4, stop_at=2, dtype="auto", device="auto", run_name="mine")
    checkpoint = load_checkpoint(folder / "last.pt")
    assert checkpoint["config"]["device"] == checkpoint["config"]["dtype"] == "auto"
    assert checkpoint["chosen"]["device"] == "cpu"
    chosen = {"device": "cuda", "dtype": "float16", "compile": "true", "document_mask": "false"}
    torch.save(checkpoint | {"chosen": chosen}, folder / "last.pt")  # a checkpoint of a T4
    train(resume="out/mine", stop_at=3)
    now = load_checkpoint(folder / "last.pt")["chosen"]
    assert now["device"] == "cpu" and now["compile"] == "false"
    assert now["dtype"] == checkpoint["chosen"]["dtype"]
    driver(gpus=1)
    settings = train_gpt2.Settings(
        max_steps=4, resume="out/mine", batch_size=4, sequence_length=16, n_layer=2, n_embd=16
    )
    model = GPT(GPTConfig(257, 16, 2, 2, 16))
    compute = train_gpt2.choose_compute(
        dataclasses.replace(settings, compile="false"),
        checkpoint["metadata"], load_checkpoint(folder / "last.pt"), choose_device("auto"), 4,
        model, train_gpt2.Ranks(),
    )  # fmt: skip
    assert compute.device == CUDA and compute.dtype == torch.bfloat16


# Each of these tests plants one fault and shows that the tests above detect it.


def test_a_tensor_left_on_the_cpu_is_detected(run_on_fake_cuda, monkeypatch):
    def forget(tensors, device):
        x, *others = tensors
        return (x, *(t.to(device) for t in others))

    monkeypatch.setattr(train_gpt2, "move_to_device", forget)
    with pytest.raises(RuntimeError, match="same device"):
        run_on_fake_cuda()


def test_a_missing_index_is_detected(run_on_fake_cuda, monkeypatch):
    def without_index(name):
        choice = choose_device(name)
        torch.cuda.set_device(torch.device("cuda"))
        return choice

    monkeypatch.setattr(train_gpt2, "choose_device", without_index)
    with pytest.raises(ValueError, match=r"Expected a torch\.device with a specified index"):
        run_on_fake_cuda()


def test_a_mask_on_the_wrong_device_is_detected(run_on_fake_cuda, monkeypatch, tmp_path):
    make_corpus(tmp_path / "data/documents", ["one for sorrow", "two for mirth"] * 99, True)
    document_mask = train_gpt2.document_mask
    monkeypatch.setattr(train_gpt2, "document_mask", lambda ids: document_mask(ids.cpu()))
    with pytest.raises(RuntimeError, match="device"):
        run_on_fake_cuda(corpus="documents", dtype="float32")


def test_a_block_mask_on_the_wrong_device_is_detected(fake_cuda, monkeypatch):
    model = GPT(GPTConfig(vocab_size=31, n_positions=256, n_layer=1, n_head=2, n_embd=32))
    monkeypatch.setattr("model.compiled_flex_attention", lambda: flex_attention)
    monkeypatch.setattr(
        f"{FLEX}._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True
    )  # no compilation inside
    block_mask = train_gpt2.document_block_mask
    monkeypatch.setattr(train_gpt2, "document_block_mask", lambda ids: block_mask(ids.cpu()))
    x = torch.randint(31, (2, 256))
    with fake_cuda():
        model = model.to(CUDA)
        with pytest.raises((RuntimeError, ValueError), match="device"):
            train_gpt2.compute_loss(model, x, x, choices(flex_attention=True))


def test_a_generator_on_the_wrong_device_is_detected(fake_cuda):
    model = GPT(GPTConfig(31, 16, 1, 2, 32))
    with fake_cuda():
        model = model.to(CUDA).eval()
        idx = torch.zeros(1, 1, dtype=torch.int64, device=CUDA)
        list(model.generate(idx, 3, generator=torch.Generator(CUDA)))
        with pytest.raises(RuntimeError, match="a generator on cpu"):
            list(model.generate(idx, 3, generator=torch.Generator("cpu")))


def test_an_optimizer_state_on_the_wrong_device_is_detected(fake_cuda):
    model = GPT(GPTConfig(31, 16, 1, 2, 32))
    with fake_cuda():
        model = model.to(CUDA)
        optimizer = create_optimizer(model, "muon", 0.01, 0.1)
        idx = torch.zeros(1, 8, dtype=torch.int64, device=CUDA)

        def step():
            model(idx, idx)[1].backward()
            optimizer.step()
            optimizer.zero_grad()

        step()
        muon = optimizer.optimizers[0]
        for p in muon.param_groups[0]["params"]:
            muon.state[p]["momentum_buffer"] = muon.state[p]["momentum_buffer"].cpu()
        with pytest.raises(RuntimeError, match="same device"):
            step()
