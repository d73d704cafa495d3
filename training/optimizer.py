"""Muon for the matrices inside the blocks, AdamW for everything else."""

from pathlib import Path
from typing import Any

import torch

from model import GPT
from training.device import has_bfloat16_units

NEWTON_SCHULZ_STEPS = 4  # torch's default is 5; bench/RECIPES.md has losses with 4


class Muon(torch.optim.Muon):
    """torch.optim.Muon (Jordan et al. 2024) that updates all matrices of one shape as one stack.

    The orthogonalization runs in bfloat16 on a GPU or CPU with units for it, in float16 on an older
    CUDA GPU, and in float32 elsewhere. torch.optim.Muon always takes bfloat16, which is tens of
    times slower on a CPU without bfloat16 instructions.
    """

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """Update all parameters that have a gradient."""
        for param_group in self.param_groups:
            # a matrix and its transpose orthogonalize alike: rows <= columns
            stacks: dict[tuple[int, int], list] = {}
            for p in param_group["params"]:
                if p.grad is not None:
                    size = (min(p.shape), max(p.shape))
                    stacks.setdefault(size, []).append(p)
            for params in stacks.values():
                self._step_stack(params, param_group)

    def _step_stack(self, params: list[torch.nn.Parameter], param_group: dict[str, Any]) -> None:
        """Update matrices of one shape, or of its transpose."""
        grads = []
        for p in params:
            assert p.grad is not None
            if not self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            momentum = self.state[p]["momentum_buffer"]
            momentum.lerp_(p.grad, 1 - param_group["momentum"])
            grad = p.grad.lerp(momentum, param_group["momentum"])  # Nesterov
            grads.append(grad.T if p.shape[0] > p.shape[1] else grad)
        updates = orthogonalize(
            torch.stack(grads), param_group["ns_coefficients"], param_group["ns_steps"]
        )
        for p, update in zip(params, updates):
            p.mul_(1 - param_group["lr"] * param_group["weight_decay"])
            update = update.T if p.shape[0] > p.shape[1] else update
            # an update as large as AdamW's: one learning rate serves both (Liu et al. 2025)
            p.add_(update, alpha=-param_group["lr"] * 0.2 * max(p.shape) ** 0.5)


def orthogonalize(
    matrices: torch.Tensor,
    coefficients: tuple[float, float, float] = (3.4445, -4.7750, 2.0315),
    steps: int = NEWTON_SCHULZ_STEPS,
) -> torch.Tensor:
    """Return approximately the nearest semi-orthogonal matrices.

    This is a quintic Newton-Schulz iteration. After four iterations, singular values of at least
    0.5% of a matrix's Frobenius norm are between about 0.7 and 1.2; smaller ones can be lower.

    Args:
        matrices: (N, rows, columns) float32, rows <= columns.
        coefficients: Factors a, b, c of the polynomial a x + b x^3 + c x^5 (Jordan et al. 2024).
        steps: Number of iterations.

    Returns:
        (N, rows, columns) float32.
    """
    a, b, c = coefficients

    def polynomial(gram: torch.Tensor) -> torch.Tensor:
        p = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        p.diagonal(dim1=1, dim2=2).add_(a)
        return p

    x = matrices / matrices.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    has_bfloat16 = has_bfloat16_units(matrices.device)
    if has_bfloat16 or matrices.is_cuda:
        x = x.to(torch.bfloat16 if has_bfloat16 else torch.float16)
        for _ in range(steps):
            x = polynomial(x @ x.mT) @ x
        return x.to(matrices.dtype)
    # Each step multiplies x by a polynomial of x x^T. We multiply the polynomials, which are small
    # (rows, rows) matrices, and then x once: half the work. 16 bits are too imprecise for this.
    gram = x @ x.mT
    factor = polynomial(gram)
    product = factor
    for _ in range(steps - 1):
        gram = factor @ gram @ factor
        factor = polynomial(gram)
        product = factor @ product
    return product @ x


class OptimizerGroup:
    """Several optimizers, of disjoint parameters, that step together.

    The group has the methods of an optimizer that torch.amp.GradScaler and the training loop call.
    Under a gradient scaler either all optimizers step or none.

    Args:
        optimizers: The optimizers.
    """

    def __init__(self, optimizers: list[torch.optim.Optimizer]):
        self.optimizers = optimizers

    @property
    def param_groups(self) -> list[dict]:
        """The parameter groups of all optimizers."""
        return [
            param_group for optimizer in self.optimizers for param_group in optimizer.param_groups
        ]

    def set_learning_rate(self, learning_rate: float) -> None:
        """Set the learning rate of every parameter group."""
        for param_group in self.param_groups:
            param_group["lr"] = learning_rate

    def step(self) -> None:
        """Update all parameters."""
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self) -> None:
        """Drop all gradients."""
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    def state_dicts(self) -> list[dict]:
        """Return one state_dict per optimizer."""
        return [optimizer.state_dict() for optimizer in self.optimizers]

    def load_states(
        self, state_dicts: list[dict], path: str | Path, never_stepped: bool = False
    ) -> None:
        """Load the states in `state_dicts`; learning rates and other options do not change.

        Args:
            state_dicts: One per optimizer, as the method state_dicts() returned them.
            path: The checkpoint that holds them, for the message.
            never_stepped: Whether every step so far was skipped, so that there is no state yet.

        Raises:
            ValueError: The states belong to other parameters.
        """
        try:
            states = [state_dict["state"] for state_dict in state_dicts]
            if never_stepped and not any(states):
                return
            for optimizer, state in zip(self.optimizers, states, strict=True):
                params = [
                    p for param_group in optimizer.param_groups for p in param_group["params"]
                ]
                for i, p in enumerate(params):
                    if not all(value.shape in ((), p.shape) for value in state[i].values()):
                        raise ValueError
                param_groups = optimizer.state_dict()["param_groups"]
                optimizer.load_state_dict({"state": state, "param_groups": param_groups})
        except (ValueError, TypeError, KeyError, AttributeError):
            raise ValueError(
                f"{path} holds no optimizer state of this model: start a new run"
            ) from None


def create_optimizer(
    model: GPT, name: str, learning_rate: float, weight_decay: float
) -> OptimizerGroup:
    """Create the optimizers of a model.

    Matrices inside the blocks are decayed; embeddings, norms and biases are not.

    Args:
        model: The model, on the device of the run.
        name: "muon" for Muon and AdamW, or "adamw" for AdamW alone.
        learning_rate: Peak of the learning rate.
        weight_decay: Weight decay of the matrices inside the blocks.

    Raises:
        ValueError: `name` is neither "muon" nor "adamw".
    """
    blocks = dict(model.transformer.h.named_parameters())
    matrices = [p for p in blocks.values() if p.dim() == 2]
    matrix_ids = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in matrix_ids]
    fused = others[0].device.type in ("cpu", "cuda")  # one pass over memory instead of ten
    adamw: dict[str, Any] = dict(lr=learning_rate, betas=(0.9, 0.99), fused=fused)
    if name == "muon":
        muon = Muon(
            matrices, lr=learning_rate, weight_decay=weight_decay, ns_steps=NEWTON_SCHULZ_STEPS
        )
        return OptimizerGroup([muon, torch.optim.AdamW(others, weight_decay=0.0, **adamw)])
    if name == "adamw":
        param_groups = [
            {"params": matrices, "weight_decay": weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        return OptimizerGroup([torch.optim.AdamW(param_groups, **adamw)])
    raise ValueError(f"optimizer must be muon or adamw, not {name!r}")
