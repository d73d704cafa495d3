"""The model on a real GPU: masks, dtypes, dropout, the KV cache, DDP, peak FLOP/s."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.parallel import DistributedDataParallel

import model as model_module
from batches.block_mask import document_block_mask
from batches.documents import document_ids, document_mask, document_positions
from bench.train import MATMULS, measure_matmul
from model import GPT, GPTConfig
from training.device import peak_flops

pytestmark = [pytest.mark.cuda, pytest.mark.timeout(600)]
EOT = 256


@pytest.fixture
def model(device) -> GPT:
    """A model with two heads of 32 channels per layer."""
    torch.manual_seed(0)
    config = GPTConfig(vocab_size=257, n_positions=256, n_layer=2, n_head=2, n_embd=64)
    return GPT(config).to(device)


@pytest.fixture
def batch(device):
    """The pair (x, y) of shape (4, 256), with an end of text in about one of forty tokens."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 256, (4, 257), generator=generator)
    tokens[torch.rand(tokens.shape, generator=generator) < 1 / 40] = EOT
    tokens = tokens.to(device)
    return tokens[:, :-1], tokens[:, 1:]


def gradients(model, x, y, positions, mask) -> torch.Tensor:
    model.zero_grad()
    _, loss = model(x, y, positions=positions, mask=mask)
    loss.backward()
    return torch.cat([p.grad.flatten().float() for p in model.parameters()])


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def test_flex_attention_equals_the_dense_mask(device, model, batch, monkeypatch):
    """The test compares logits and, on a GPU, gradients: flex_attention does not train on a CPU."""
    x, y = batch
    ids = document_ids(x, EOT)
    positions = document_positions(ids)
    dense = document_mask(ids)
    blocks = document_block_mask(ids)
    if device.type == "cpu":
        monkeypatch.setattr(model_module, "compiled_flex_attention", lambda: flex_attention)
    with torch.no_grad():
        expected, _ = model(x, positions=positions, mask=dense)
        actual, _ = model(x, positions=positions, mask=blocks)
        without_mask, _ = model(x)
    assert relative_error(actual, expected) < 1e-3
    assert relative_error(without_mask, expected) > 1e-2  # the mask makes a difference
    if device.type == "cuda":
        expected = gradients(model, x, y, positions, dense)
        actual = gradients(model, x, y, positions, blocks)
        assert relative_error(actual, expected) < 5e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_near_float32(device, model, batch, dtype):
    x, y = batch
    with torch.no_grad():
        _, expected = model(x, y)
        with torch.autocast(device.type, dtype):
            _, actual = model(x, y)
    assert actual.item() == pytest.approx(expected.item(), rel=0.01)


def test_the_gpu_agrees_with_the_cpu(device, model, batch):
    x, y = batch
    on_cpu = copy.deepcopy(model).cpu()
    expected = gradients(on_cpu, x.cpu(), y.cpu(), None, None)
    assert relative_error(gradients(model, x, y, None, None).cpu(), expected) < 5e-3


def test_dropout_follows_the_seed_and_ends_with_eval(device, batch):
    x, y = batch
    torch.manual_seed(0)
    model = GPT(GPTConfig(257, 256, n_layer=2, n_head=2, n_embd=64, dropout=0.5)).to(device)

    def loss(seed: int) -> float:
        torch.manual_seed(seed)
        with torch.no_grad():
            return model(x, y)[1].item()

    assert loss(1) == loss(1)
    assert loss(1) != loss(2)
    model.eval()
    assert loss(1) == loss(2)


def test_the_cache_gives_the_tokens_of_a_model_without_cache(device, model, batch):
    """Generation is greedy in float32; a scaled embedding makes the largest logit distinct."""
    model.eval()
    with torch.no_grad():
        model.transformer.wte.weight.mul_(20)
    prompt = batch[0][:2, :16]
    generated = torch.stack(list(model.generate(prompt, 40, temperature=0)), dim=1)
    ids = prompt
    with torch.no_grad():
        for _ in range(40):
            logits, _ = model(ids)
            ids = torch.cat((ids, logits[:, -1].argmax(-1, keepdim=True)), dim=1)
    assert torch.equal(generated, ids[:, 16:])


def test_sampling_repeats_with_the_seed_of_a_generator_on_the_device(device, model, batch):
    def sample():
        generator = torch.Generator(device).manual_seed(3)
        return torch.stack(list(model.generate(batch[0][:1], 20, generator=generator)))

    assert torch.equal(sample(), sample())


def test_ddp_of_one_process_gives_the_same_gradients(device, model, batch, tmp_path):
    """nccl (gloo in a rehearsal) loads, and DDP gives the gradients of the plain model.

    The test does not cover communication between GPUs.
    """
    x, y = batch
    expected = gradients(model, x, y, None, None)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(
        backend, init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1
    )
    try:
        index = [device.index] if device.type == "cuda" else None
        actual = gradients(DistributedDataParallel(model, device_ids=index), x, y, None, None)
        total = torch.ones(1, device=device)
        dist.all_reduce(total)
    finally:
        dist.destroy_process_group()
    assert relative_error(actual, expected) < 1e-5
    assert total.item() == 1


def test_no_matrix_product_exceeds_the_peak(gpu):
    """The table of training/device.py has the peak of this GPU, or None."""
    dtype = torch.bfloat16 if torch.cuda.get_device_capability(gpu) >= (8, 0) else torch.float16
    measured = measure_matmul(gpu, dtype, *MATMULS["cuda"][0])
    peak = peak_flops(gpu, dtype)
    name = torch.cuda.get_device_name(gpu)
    print(f"{name}: {measured / 1e12:.1f} TFLOP/s measured in {dtype}; in the table: {peak}")
    assert measured > 0
    if peak is not None:
        assert measured < 1.05 * peak
