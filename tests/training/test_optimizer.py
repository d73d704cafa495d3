"""Muon and AdamW."""

import pytest
import torch

from model import GPT, GPTConfig
from training.optimizer import Muon, create_optimizer, orthogonalize


@pytest.mark.parametrize("instructions, tolerance", [("avx2", 1e-3), ("avx512_bf16", 0.02)])
@pytest.mark.parametrize("rows, columns", [(8, 8), (8, 32), (64, 65)])
def test_orthogonalize_brings_singular_values_near_one(
    processor, rows, columns, instructions, tolerance
):
    processor(instructions)  # with avx512_bf16 in bfloat16, which has 8 bits of precision
    torch.manual_seed(0)
    g = torch.randn(3, rows, columns)
    g *= torch.tensor([1e-4, 1.0, 1e4]).view(3, 1, 1)  # the scale has no influence
    x = orthogonalize(g)
    for before, after in zip(g, x):
        u, s, v = torch.linalg.svd(before, full_matrices=False)
        mixed = u.T @ after @ v.T  # the same directions: diagonal
        torch.testing.assert_close(mixed, mixed.diag().diag(), atol=tolerance, rtol=0)
        assert (mixed.diag()[s > 0.05 * s.max()] > 0.6).all() and (mixed.diag() < 1.3).all()


@pytest.mark.parametrize("rows, columns", [(8, 8), (8, 32), (32, 33)])
def test_orthogonalize_equals_the_newton_schulz_iteration(processor, rows, columns):
    """In float32. The reference is the plain iteration in float64; ranks are full or low."""
    processor("avx2")
    torch.manual_seed(0)
    low = torch.randn(2, rows, 3) @ torch.randn(2, 3, columns)
    for g in (torch.randn(2, rows, columns), low):
        x = g.double() / g.double().norm(dim=(1, 2), keepdim=True)
        for _ in range(5):
            gram = x @ x.mT
            x = 3.4445 * x + (-4.775 * gram + 2.0315 * gram @ gram) @ x
        torch.testing.assert_close(orthogonalize(g, steps=5), x.float(), atol=1e-4, rtol=0)


def test_muon_equals_torchs_muon():
    """The tolerance covers torch's iteration, which rounds to bfloat16."""
    torch.manual_seed(0)
    shapes = [(12, 4), (4, 12), (6, 6), (4, 12), (1, 5)]
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    a = Muon(ours, lr=0.1, weight_decay=0.3)
    b = torch.optim.Muon(theirs, lr=0.1, weight_decay=0.3, adjust_lr_fn="match_rms_adamw")
    for _ in range(5):
        for p, q in zip(ours, theirs):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        a.step()
        b.step()
    for p, q in zip(ours, theirs):
        torch.testing.assert_close(p, q, atol=0.02, rtol=0.02)
        torch.testing.assert_close(a.state[p]["momentum_buffer"], b.state[q]["momentum_buffer"])


def test_every_parameter_has_one_optimizer():
    model = GPT(GPTConfig(50, 16, 2, 2, 8))
    for name in ("muon", "adamw"):
        groups = create_optimizer(model, name, learning_rate=0.1, weight_decay=0.2).param_groups
        ids = [id(p) for group in groups for p in group["params"]]
        assert sorted(ids) == sorted(id(p) for p in model.parameters())
        decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
        matrices = {id(p) for p in model.transformer.h.parameters() if p.dim() == 2}
        assert decayed == matrices
    assert type(create_optimizer(model, "muon", 0.1, 0.2).optimizers[0]) is Muon
