"""Muon for the matrices inside the blocks, AdamW for everything else."""

import torch

STEPS = 4  # of Newton and Schulz; a fifth, which torch takes, changes no loss here


class Muon(torch.optim.Muon):
    """torch.optim.Muon (Jordan et al. 2024), stepping all matrices of one shape as one stack.

    The orthogonalisation runs in bfloat16 on a GPU and in float32 on a CPU, where torch's own
    (always bfloat16) is tens of times slower unless the processor has bfloat16 instructions.
    """

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            stacks = {}  # a matrix and its transpose orthogonalise alike: rows <= columns
            for p in group["params"]:
                if p.grad is not None:
                    stacks.setdefault((min(p.shape), max(p.shape)), []).append(p)
            for params in stacks.values():
                grads = []
                for p in params:
                    if not self.state[p]:
                        self.state[p]["momentum_buffer"] = torch.zeros_like(p)
                    momentum = self.state[p]["momentum_buffer"]
                    momentum.lerp_(p.grad, 1 - group["momentum"])
                    grad = p.grad.lerp(momentum, group["momentum"])  # Nesterov
                    grads.append(grad.T if p.shape[0] > p.shape[1] else grad)
                updates = orthogonalize(
                    torch.stack(grads), group["ns_coefficients"], group["ns_steps"]
                )
                for p, update in zip(params, updates):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    update = update.T if p.shape[0] > p.shape[1] else update
                    # an update as large as AdamW's: one learning rate serves both (Liu et al. 2025)
                    p.add_(update, alpha=-group["lr"] * 0.2 * max(p.shape) ** 0.5)


def orthogonalize(g, coefficients=(3.4445, -4.7750, 2.0315), steps=STEPS):
    """(N, rows, columns) matrices, rows <= columns -> the nearest semi-orthogonal ones, roughly
    (singular values between 0.7 and 1.2), by a quintic Newton-Schulz iteration."""
    a, b, c = coefficients
    x = g.bfloat16() if g.is_cuda else g
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)

    def polynomial(gram):
        p = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        p.diagonal(dim1=1, dim2=2).add_(a)
        return p

    if g.is_cuda:
        for _ in range(steps):
            x = polynomial(x @ x.mT) @ x
        return x.to(g.dtype)
    # Each step multiplies x by a polynomial of x x^T. To multiply these with each other, rows by
    # rows, and only the last by x, is half the work; bfloat16 has too few digits for it.
    gram = x @ x.mT
    product = factor = polynomial(gram)
    for _ in range(steps - 1):
        gram = factor @ gram @ factor
        factor = polynomial(gram)
        product = factor @ product
    return product @ x


def load_states(optimizers: list, saved: list, run) -> None:
    """Takes over the states that optimizers of the same parameters have saved in `run`; their
    constants stay as they are. Raises ValueError for states of others."""
    try:
        for optimizer, state in zip(optimizers, [part["state"] for part in saved], strict=True):
            params = [p for group in optimizer.param_groups for p in group["params"]]
            for p, values in zip(params, [state[i] for i in range(len(params))], strict=True):
                if not all(value.shape in ((), p.shape) for value in values.values()):
                    raise ValueError
            groups = optimizer.state_dict()["param_groups"]
            optimizer.load_state_dict({"state": state, "param_groups": groups})
    except (ValueError, TypeError, KeyError, AttributeError):
        raise ValueError(f"{run}/last.pt has no optimizer of this model: train anew") from None


def create_optimizers(model, name: str, learning_rate: float, weight_decay: float):
    """[Muon, AdamW] for name "muon", [AdamW] for "adamw"; step() and zero_grad() each of them.

    Matrices inside the blocks decay; embeddings, norms and biases don't. Raises ValueError for
    another name.
    """
    blocks = dict(model.transformer.h.named_parameters())
    matrices = [p for p in blocks.values() if p.dim() == 2]
    inside = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in inside]
    fused = others[0].device.type in ("cpu", "cuda")  # one pass over memory instead of ten
    adamw = dict(lr=learning_rate, betas=(0.9, 0.99), fused=fused)
    if name == "muon":
        return [
            Muon(matrices, lr=learning_rate, weight_decay=weight_decay, ns_steps=STEPS),
            torch.optim.AdamW(others, weight_decay=0.0, **adamw),
        ]
    if name == "adamw":
        groups = [
            {"params": matrices, "weight_decay": weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        return [torch.optim.AdamW(groups, **adamw)]
    raise ValueError(f"optimizer must be muon or adamw, not {name!r}")
