"""
Optimizers and schedules by name.

    optimizers = optim.build(model, config)                 # a list: one or two torch optimizers
    optim.set_lr(optimizers, optim.schedule(config, step))  # each group's base_lr times a factor

Schedules are pure functions of the step, so a resume needs only the step.
"""

import inspect
import math
from collections.abc import Callable

import torch
from torch import nn

from model import Head


class WithoutCompile:
    """torch.optim's methods without their wrapping for torch.compile, which takes 0.8 s to import."""

    add_param_group, zero_grad, state_dict, load_state_dict = (
        inspect.unwrap(getattr(torch.optim.Optimizer, name))
        for name in ("add_param_group", "zero_grad", "state_dict", "load_state_dict")
    )


class AdamW(WithoutCompile, torch.optim.AdamW):
    step = torch.no_grad()(inspect.unwrap(torch.optim.AdamW.step))
    kept = {"step": False, "exp_avg": True, "exp_avg_sq": True}  # of a parameter: True is a tensor like it


def orthogonalize(g: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """
    Matrices g (n, rows, columns) -> roughly U V^T of their singular value decompositions U S V^T, in bf16, by
    a quintic Newton-Schulz iteration (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon).
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = (g.mT if g.shape[1] > g.shape[2] else g).bfloat16()
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)  # singular values of at most 1
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if g.shape[1] > g.shape[2] else x


class Muon(WithoutCompile, torch.optim.Optimizer):
    """
    SGD with Nesterov momentum whose updates are orthogonalized matrices, scaled to the size of AdamW's (Liu
    et al. 2025, arXiv 2502.16982). It computes what torch.optim.Muon does, for all matrices of one shape at
    once. Like the fused AdamW, it skips an update if its attribute found_inf, a tensor, is 1.
    """

    kept = {"momentum_buffer": True}
    found_inf: torch.Tensor | None = None

    def __init__(self, params, lr: float = 0.01, momentum: float = 0.95, weight_decay: float = 0.1):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[nn.Parameter]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    by_shape.setdefault(p.shape, []).append(p)
            for params in by_shape.values():
                self.update(params, group["lr"], group["momentum"], group["weight_decay"])

    def update(self, params: list, lr: float, momentum: float, weight_decay: float) -> None:
        for p in params:
            self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
        buffers, grads = [self.state[p]["momentum_buffer"] for p in params], [p.grad for p in params]
        decay, rate = 1 - lr * weight_decay, -lr * (0.2 * math.sqrt(max(params[0].shape)))
        if self.found_inf is not None:
            skip = self.found_inf > 0
            decay, keep = torch.where(skip, 1.0, decay), (~skip).to(params[0].dtype)
            grads = [torch.where(skip, buffer, g) for buffer, g in zip(buffers, grads, strict=True)]
        torch._foreach_lerp_(buffers, grads, 1 - momentum)
        updates = orthogonalize(torch.stack(torch._foreach_lerp(grads, buffers, momentum)))
        if self.found_inf is not None:
            updates = updates * keep
        torch._foreach_mul_(params, decay)
        torch._foreach_add_(params, updates.unbind(), alpha=rate)


def build(model: nn.Module, c, fused: bool = True) -> list[torch.optim.Optimizer]:
    """
    AdamW for everything, or (optimizer="muon") Muon for the matrices of linear layers and AdamW for the rest:
    embeddings, head, norms, biases, convolutions. Vectors do not decay. Each group has its `base_lr`.
    """
    groups = {kind: [] for kind in ("matrix", "embedding", "head", "vector", "tensor")}
    of_heads = {p for module in model.modules() if isinstance(module, Head) for p in module.parameters()}
    for name, p in model.named_parameters():  # named_parameters yields tied and shared tensors once
        module = model.get_submodule(name.rpartition(".")[0])
        kinds = {
            "vector": p.ndim < 2,
            "embedding": isinstance(module, nn.Embedding),
            "head": p in of_heads,
            "matrix": isinstance(module, nn.Linear),
            "tensor": True,
        }
        groups[next(kind for kind, holds in kinds.items() if holds)].append(p)
    lr = {"embedding": c.embedding_lr, "head": c.head_lr}
    adam, muon = [], []
    for kind, params in groups.items():
        if not params:
            continue
        group = {"params": params, "lr": lr.get(kind) or c.learning_rate}
        group["weight_decay"] = 0.0 if kind == "vector" else c.weight_decay
        if kind == "matrix" and c.optimizer == "muon":
            muon.append(group | {"lr": c.muon_lr})
        else:
            adam.append(group)
    found = [AdamW(adam, betas=(c.beta1, c.beta2), fused=fused)] if adam else []
    if muon:
        found.append(Muon(muon, momentum=c.muon_momentum))
    for optimizer in found:
        for group in optimizer.param_groups:
            group["base_lr"] = group["lr"]
    return found


def load_states(optimizers: list, states: list[dict], fit: Callable[[dict, dict], None]) -> None:
    """Load the moments of saved states; learning rates stay as they are. `fit` is checkpoint.fit."""
    for optimizer, state in zip(optimizers, states, strict=True):
        current = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
        optimizer.load_state_dict(state)
        for group, values in zip(optimizer.param_groups, current, strict=True):
            group.update(values)
            for p in filter(optimizer.state.get, group["params"]):
                wanted = {k: p if like else torch.zeros(()) for k, like in optimizer.kept.items()}
                fit(optimizer.state[p], wanted)


def schedule(c, step: int) -> float:
    """
    The factor on every learning rate at `step` (0, 1, ... before its update): linear warmup over
    warmup_iters, then the decay c.schedule to min_lr / learning_rate, which is reached at the last update and
    held after it.
    """
    if step < c.warmup_iters:
        return (step + 1) / (c.warmup_iters + 1)
    min_factor, end = c.min_lr / c.learning_rate, c.lr_decay_iters or c.max_iters
    start = c.warmup_iters
    if c.schedule == "wsd":  # warmup, stable, decay: arXiv 2404.06395
        start = max(start, round(end * (1 - c.decay_share)))
    done = min(1.0, max(0.0, (step - start) / max(1, end - 1 - start)))  # 1 at the last update, end - 1
    return min_factor + (1 - min_factor) * SCHEDULES[c.schedule](done)


SCHEDULES = {  # the share of the way down that is left when `done` (0 to 1) of it has passed
    "cosine": lambda done: 0.5 * (1 + math.cos(math.pi * done)),
    "linear": lambda done: 1 - done,
    "wsd": lambda done: 1 - done,
    "constant": lambda done: 1.0,
}


def set_lr(optimizers: list[torch.optim.Optimizer], factor: float) -> None:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor


def points(name: str, text: str, low: float = 0.0, high: float = 0.999) -> list[tuple[float, float]]:
    """'0:0.0, 500:0.1' -> [(0, 0.0), (500, 0.1)]. ValueError unless steps and values are valid."""
    try:
        found = [(float(step), float(value)) for step, value in (pair.split(":") for pair in text.split(","))]
    except ValueError:
        raise ValueError(f"{name} is a list like '0:0.0, 500:0.1', not {text!r:.60}") from None
    steps = [step for step, _ in found]
    if not all(0 <= step <= 10**9 for step in steps) or sorted(set(steps)) != steps:
        raise ValueError(f"the steps of {name} must increase, from 0 on: {text!r:.60}")
    if not all(low <= value <= high for _, value in found):
        raise ValueError(f"the values of {name} must be between {low} and {high}: {text!r:.60}")
    return found


def interpolate(schedule: list[tuple[float, float]], step: int) -> float:
    """The value at `step` on the line through (step, value) points, constant outside of them."""
    if step <= schedule[0][0]:
        return schedule[0][1]
    for (a, x), (b, y) in zip(schedule, schedule[1:], strict=False):
        if step <= b:
            return x + (y - x) * (step - a) / (b - a)
    return schedule[-1][1]


def window_stages(schedule: str, iters: int, block_size: int) -> list[tuple[int, int]]:
    """
    context_schedule, "0:0.25, 0.5:1" as shares of the run and of block_size, -> pairs (first update, window
    length). An empty schedule is one stage of block_size.
    """
    if not schedule:
        return [(0, block_size)]
    shares = points("context_schedule", schedule, 0, 1)
    stages = [(round(share * iters), round(block_size * part)) for share, part in shares]
    exact = all(
        part and block_size * part == n and block_size % n == 0
        for (_, part), (_, n) in zip(shares, stages, strict=True)
    )
    if shares[0][0] or shares[-1][0] > 1 or shares[-1][1] != 1 or not exact:
        raise ValueError(
            f"context_schedule={schedule!r:.60} must begin at 0, end with 1, and give lengths that divide "
            f"block_size={block_size}"
        )
    return stages


def set_dropout(model: nn.Module, p: float) -> None:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = p
        elif type(getattr(module, "dropout", None)) in (int, float):
            module.dropout = p
