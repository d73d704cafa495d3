"""GPT-2: shapes, logits, masks and generation against references written by hand."""

import math
import shutil

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import create_block_mask

from batches.block_mask import document_block_mask
from dataset import document_ids, document_mask, document_positions
from model import EMBEDDING, GPT, GPT2_SIZES, GPTConfig, next_token_probs
from training.huggingface import RELEASED


def small_model(seed=0, **changes) -> GPT:
    torch.manual_seed(seed)
    shape = {"vocab_size": 50, "n_positions": 16, "n_layer": 3, "n_head": 4, "n_embd": 32}
    return GPT(GPTConfig(**shape | changes)).eval()


@pytest.mark.parametrize(
    "name, parameters",
    [
        ("gpt2", 124_439_808),
        ("gpt2-medium", 354_823_168),
        ("gpt2-large", 774_030_080),
        ("gpt2-xl", 1_557_611_200),
    ],
)
def test_parameter_counts_equal_openais(name, parameters):
    with torch.device("meta"):  # shapes without memory
        model = GPT(GPTConfig(**GPT2_SIZES[name]))
    assert model.num_parameters() == parameters


def test_the_names_of_sizes_equal_those_of_released_models():
    assert tuple(GPT2_SIZES) == RELEASED


def test_flops_equal_a_count_by_hand():
    with torch.device("meta"):
        model = GPT(GPTConfig(**GPT2_SIZES["gpt2"]))
    matrices = 124_439_808 - 1024 * 768
    assert model.flops_per_token(1024) == 6 * matrices + 12 * 12 * 768 * 1024
    assert model.flops_per_token(256) == 6 * matrices + 12 * 12 * 768 * 256


def test_parameter_names_and_shapes_equal_openais():
    shapes = {name: tuple(p.shape) for name, p in small_model(n_layer=1).state_dict().items()}
    assert shapes == {
        "transformer.wte.weight": (50, 32),
        "transformer.wpe.weight": (16, 32),
        "transformer.h.0.ln_1.weight": (32,),
        "transformer.h.0.ln_1.bias": (32,),
        "transformer.h.0.attn.c_attn.weight": (96, 32),
        "transformer.h.0.attn.c_attn.bias": (96,),
        "transformer.h.0.attn.c_proj.weight": (32, 32),
        "transformer.h.0.attn.c_proj.bias": (32,),
        "transformer.h.0.ln_2.weight": (32,),
        "transformer.h.0.ln_2.bias": (32,),
        "transformer.h.0.mlp.c_fc.weight": (128, 32),
        "transformer.h.0.mlp.c_fc.bias": (128,),
        "transformer.h.0.mlp.c_proj.weight": (32, 128),
        "transformer.h.0.mlp.c_proj.bias": (32,),
        "transformer.ln_f.weight": (32,),
        "transformer.ln_f.bias": (32,),
    }


def test_logits_equal_gpt2_in_plain_matrix_products():
    model = small_model()
    idx = torch.randint(50, (1, 16))
    for p in model.parameters():  # no weight of a norm stays 1, no bias stays 0
        p.data += 0.3 * torch.randn_like(p)
    w = {name.removeprefix("transformer."): p for name, p in model.state_dict().items()}

    def norm(x, name):
        return F.layer_norm(x, (32,), w[f"{name}.weight"], w[f"{name}.bias"], 1e-5)

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    x = w["wte.weight"][idx[0]] + w["wpe.weight"]  # (16, 32)
    for i in range(3):
        q, k, v = linear(norm(x, f"h.{i}.ln_1"), f"h.{i}.attn.c_attn").split(32, dim=1)
        heads = []
        for h in range(4):
            part = slice(8 * h, 8 * h + 8)
            scores = q[:, part] @ k[:, part].T / math.sqrt(8)
            scores[torch.triu(torch.ones(16, 16), 1).bool()] = -math.inf
            heads.append(scores.softmax(1) @ v[:, part])
        x = x + linear(torch.cat(heads, 1), f"h.{i}.attn.c_proj")
        y = linear(norm(x, f"h.{i}.ln_2"), f"h.{i}.mlp.c_fc")
        y = 0.5 * y * (1 + torch.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3)))
        x = x + linear(y, f"h.{i}.mlp.c_proj")
    expected = norm(x, "ln_f") @ w["wte.weight"].T
    torch.testing.assert_close(model(idx)[0][0], expected, atol=1e-5, rtol=1e-5)


def test_tokens_do_not_see_the_future():
    model, idx = small_model(), torch.randint(50, (1, 16))
    changed = idx.clone()
    changed[0, 9:] = (idx[0, 9:] + 1) % 50
    a, b = model(idx)[0], model(changed)[0]
    assert torch.equal(a[0, :9], b[0, :9])
    assert not torch.allclose(a[0, 9:], b[0, 9:])


def test_the_loss_is_the_mean_over_targets_that_are_not_ignored():
    model, idx, targets = small_model(), torch.randint(50, (2, 8)), torch.randint(50, (2, 8))
    targets[0, 3:] = -100
    log_probs = model(idx)[0].log_softmax(-1)
    kept = [(b, t) for b in range(2) for t in range(8) if targets[b, t] >= 0]
    expected = -sum(log_probs[b, t, targets[b, t]] for b, t in kept)
    torch.testing.assert_close(model(idx, targets)[1], expected / len(kept))
    torch.testing.assert_close(model(idx, targets, reduction="sum")[1], expected)


def test_attention_in_float64_has_the_precision_of_float64():
    attention = small_model().double().transformer.h[0].attn
    x = torch.randn(1, 8, 32, dtype=torch.float64)
    q, k, v = attention.c_attn(x).view(8, 3, 4, 8).permute(1, 2, 0, 3)  # each (n_head, T, 8)
    future = torch.ones(8, 8).triu(1).bool()
    weights = (q @ k.mT / 8**0.5).masked_fill(future, -math.inf).softmax(-1)
    expected = attention.c_proj((weights @ v).transpose(0, 1).reshape(1, 8, 32))
    torch.testing.assert_close(attention(x), expected, rtol=1e-12, atol=1e-12)


def test_padded_rows_of_the_output_layer_change_nothing(tmp_path):
    """Loss, logits, gradients and exports do not depend on the values in the padded rows."""
    plain = small_model()
    padded = small_model(vocab_multiple=64)
    weights = plain.state_dict()
    rows = torch.cat((weights[EMBEDDING], torch.full((14, 32), 9.0)))
    padded.load_state_dict(weights | {EMBEDDING: rows})
    idx, targets = torch.randint(50, (2, 8)), torch.randint(50, (2, 8))
    assert padded.transformer.wte.weight.shape == (64, 32)
    assert padded(idx)[0].shape == (2, 8, 50)
    torch.testing.assert_close(padded(idx)[0], plain(idx)[0])
    losses = [model(idx, targets)[1] for model in (plain, padded)]
    torch.testing.assert_close(*losses)
    gradients = [
        torch.autograd.grad(loss, model.transformer.wte.weight)[0]
        for loss, model in zip(losses, (plain, padded))
    ]
    torch.testing.assert_close(gradients[1][:50], gradients[0])
    assert gradients[1][50:].abs().max() == 0
    assert padded.num_parameters() == plain.num_parameters()
    padded.save_pretrained(tmp_path)
    again = GPT.from_pretrained(tmp_path, vocab_multiple=64)
    assert again.transformer.wte.weight.shape == (64, 32)
    torch.testing.assert_close(again(idx)[0], plain(idx)[0])
    assert GPT.from_pretrained(tmp_path).transformer.wte.weight.shape == (50, 32)


def test_the_initial_loss_is_that_of_a_uniform_guess():
    idx = torch.randint(50, (8, 17))
    assert abs(small_model()(idx[:, :-1], idx[:, 1:])[1].item() - math.log(50)) < 0.05


def test_dropout_acts_in_training_mode_only():
    model, idx = small_model(dropout=0.5), torch.randint(50, (1, 16))
    assert torch.equal(model(idx)[0], model(idx)[0])
    model.train()
    assert not torch.equal(model(idx)[0], model(idx)[0])
    torch.manual_seed(3)
    a = model(idx)[0]
    torch.manual_seed(3)
    assert torch.equal(a, model(idx)[0])


def test_wrong_shapes_are_refused():
    for wrong, words in [
        ({"n_embd": 30}, r"n_embd \(30\) must be a multiple of n_head \(4\)"),
        ({"n_layer": 0}, "n_layer must be a number from 1 to 1,000"),
        ({"dropout": 1.0}, "dropout"),
    ]:
        with pytest.raises(ValueError, match=words):
            small_model(**wrong)
    with pytest.raises(ValueError, match="17 tokens is longer than the model's 16 positions"):
        small_model()(torch.zeros(1, 17, dtype=torch.long))


def generate_without_cache(model, idx, n):
    """Return a greedy continuation; the model processes the whole window for every token."""
    for _ in range(n):
        logits = model(idx[:, -model.config.n_positions :])[0][:, -1]
        idx = torch.cat((idx, logits.argmax(-1, keepdim=True)), dim=1)
    return idx[:, -n:]


@pytest.mark.parametrize("prompt", [1, 5, 16, 20])
def test_generation_with_the_cache_equals_generation_without(prompt):
    model, idx = small_model(), torch.randint(50, (2, prompt))
    for p in model.parameters():
        p.data *= 5  # far from a uniform guess, so that the tokens differ
    tokens = torch.stack(list(model.generate(idx, 30, temperature=0)), dim=1)
    assert torch.equal(tokens, generate_without_cache(model, idx, 30))
    assert len(tokens.unique()) > 3


def test_generation_stops_when_all_rows_have_the_stop_token():
    """A row that has ended repeats the stop token until the others have ended."""
    model, idx = small_model(), torch.randint(50, (2, 4))
    for p in model.parameters():
        p.data *= 5
    free = torch.stack(list(model.generate(idx, 30, temperature=0)), dim=1)
    stop_token = int(free[0, 3])
    found = torch.stack(list(model.generate(idx, 30, temperature=0, stop_token=stop_token)), dim=1)
    lengths = []
    for row, free_row in zip(found.tolist(), free.tolist()):
        length = free_row.index(stop_token) if stop_token in free_row else 30
        assert row == (free_row[:length] + [stop_token] * 30)[: len(row)]
        lengths.append(length + 1)
    assert found.shape[1] == min(30, max(lengths))


def test_generation_repeats_with_the_seed():
    model, idx = small_model(), torch.zeros(1, 1, dtype=torch.long)

    def text(seed):
        generator = torch.Generator().manual_seed(seed)
        return [i.item() for i in model.generate(idx, 20, generator=generator)]

    assert text(1) == text(1) != text(2)


def test_next_token_probs():
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()

    def probs(**options):
        return next_token_probs(logits, **options)[0].tolist()

    assert probs() == pytest.approx([0.4, 0.3, 0.2, 0.1])
    assert probs(temperature=0) == probs(temperature=1e-39) == [1, 0, 0, 0]
    assert probs(temperature=0.5) == pytest.approx([16 / 30, 9 / 30, 4 / 30, 1 / 30])
    assert probs(top_k=2) == pytest.approx([4 / 7, 3 / 7, 0, 0])
    assert probs(top_k=99) == pytest.approx([0.4, 0.3, 0.2, 0.1])
    assert probs(top_p=0.69) == pytest.approx([4 / 7, 3 / 7, 0, 0])
    assert probs(top_p=0.71) == pytest.approx([4 / 9, 3 / 9, 2 / 9, 0])
    assert probs(top_p=0.01) == [1, 0, 0, 0]


EOT_TOKEN = 30


@pytest.fixture
def packed():
    """A model, rows of three documents and their document ids."""
    torch.manual_seed(1)
    model = GPT(GPTConfig(vocab_size=31, n_positions=32, n_layer=3, n_head=2, n_embd=32)).eval()
    row = torch.randint(0, EOT_TOKEN, (2, 32))
    row[:, [9, 20]] = EOT_TOKEN
    return model, row, document_ids(row, EOT_TOKEN)


def logits_of(model, row, ids):
    with torch.no_grad():
        return model(row, positions=document_positions(ids), mask=document_mask(ids))[0]


def test_a_packed_document_has_the_same_logits_as_alone(packed):
    model, row, ids = packed
    found = logits_of(model, row, ids)
    for start, stop in ((0, 9), (9, 20), (20, 32)):
        with torch.no_grad():
            alone = model(row[:, start:stop])[0]
        torch.testing.assert_close(found[:, start:stop], alone, atol=1e-5, rtol=0)


def test_documents_do_not_see_each_other(packed):
    """Earlier documents do not change the logits of a document at all."""
    model, row, ids = packed
    other = row.clone()
    other[:, :9] = (row[:, :9] + 1) % EOT_TOKEN
    moved = (logits_of(model, row, ids) - logits_of(model, other, ids)).abs().amax(-1)
    assert moved[:, :9].min() > 0
    assert moved[:, 9:].max() == 0.0
    with torch.no_grad():
        leaks = (model(row)[0] - model(other)[0]).abs().amax(-1)
    assert leaks[:, 9:].min() > 0  # without the mask, they change


def test_gradients_stay_in_a_document(packed):
    model, row, ids = packed
    targets = torch.full_like(row, -100)
    targets[:, 9:20] = row[:, 10:21]  # targets of the second document only
    embedded = {}

    def keep(module, inputs, output):
        output.retain_grad()
        embedded["x"] = output

    model.transformer.wte.register_forward_hook(keep)
    model(row, targets, positions=document_positions(ids), mask=document_mask(ids))[1].backward()
    moved = embedded["x"].grad.abs().amax(-1)
    assert moved[:, 9:20].min() > 0
    assert moved[:, :9].max() == 0
    assert moved[:, 20:].max() == 0


@pytest.mark.parametrize("T", [32, 128, 300, 512])
def test_document_block_mask_equals_create_block_mask(T):
    torch.manual_seed(T)
    ids = (torch.rand(5, T) < torch.tensor([0.0, 0.001, 0.01, 0.1, 1.0])[:, None]).cumsum(1)

    def sees(b, h, query, key):
        return (ids[b, query] == ids[b, key]) & (query >= key)

    expected = create_block_mask(sees, 5, None, T, T, device="cpu")
    found = document_block_mask(ids)
    assert found.shape == expected.shape
    assert torch.equal(found.to_dense(), expected.to_dense())
    for name in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    for kind in ("kv", "full_kv", "q", "full_q"):
        counts = getattr(expected, f"{kind}_num_blocks")
        used = torch.arange(counts.shape[-1]) < counts[..., None]
        indices = [getattr(mask, f"{kind}_indices")[used] for mask in (found, expected)]
        assert torch.equal(*indices), kind


@pytest.mark.skipif(not shutil.which("c++"), reason="torch.compile needs a C++ compiler on a CPU")
def test_flex_attention_equals_the_dense_mask(packed):
    """The test runs without gradients, as a CPU requires, with a plain and a traced model."""
    model, row, ids = packed
    for compiled in (model, torch.compile(model, fullgraph=True, backend="eager")):
        with torch.no_grad():
            options = {"positions": document_positions(ids), "mask": document_block_mask(ids)}
            found, _ = compiled(row, **options)
        torch.testing.assert_close(found, logits_of(model, row, ids), atol=1e-5, rtol=0)
