"""
Distillation: the model learns from the probabilities of a teacher as well as from the text.

    loss = (1 - alpha) * cross-entropy + alpha * temperature^2 * KL(teacher || model at this temperature)

Hinton et al. 2015 (arXiv 1503.02531), with the mean logits of several teachers as in BabyLlama (arXiv
2308.02019). The teacher must have the same tokenizer. It reads each batch once, without gradients; logits
exist for a chunk of tokens at a time, and are computed again in the backward pass.

    python train.py config/tiny.py --objective=distill --teacher=out/teacher
"""

import statistics
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import experiments
from model import GPT, check_settings
from nanostlm import checkpoint as checkpoints
from nanostlm.machine import print0


@dataclass(frozen=True)
class Config:
    teacher: str = ""  # a run or a checkpoint; several, separated by commas: the mean of their logits
    alpha: float = 0.5  # weight of the teacher's part; that of the cross-entropy is 1 - alpha
    temperature: float = 2.0  # of both distributions; 1 = as they are

    def validate(self) -> None:
        check_settings(self, {"alpha": (0, 1), "temperature": (1e-3, 1e3)}, {})
        if not self.teacher:
            raise ValueError("objective=distill needs a teacher, as in --teacher=out/teacher")


class Objective(experiments.Objective):
    def __init__(self, config, model, data):
        super().__init__(config, model, data)
        if not isinstance(model, GPT):
            raise ValueError(
                f"leave out objective=distill: architecture={config.architecture} is not made for it"
            )
        device = next(model.parameters()).device
        self.teachers = [self.load(path.strip(), device) for path in self.config.teacher.split(",")]
        self.overhead_printed = False

    def load(self, path: str, device: torch.device) -> GPT:
        teacher, tokenizer = checkpoints.load(path, device)
        if not isinstance(teacher, GPT):
            raise ValueError(f"the teacher {path} is an experiment, which cannot be a teacher")
        if tokenizer.state() != self.data.tokenizer.state():
            raise ValueError(
                f"the teacher {path} has another tokenizer ({tokenizer.name}) than {self.data.folder}: "
                "train it on the same data"
            )
        if teacher.config.block_size < self.model.config.block_size:
            raise ValueError(
                f"the teacher {path} has a context of {teacher.config.block_size} tokens: lower block_size"
            )
        return teacher.requires_grad_(False)

    def __call__(self, model: GPT, idx: Tensor, targets: Tensor, step: int) -> tuple[Tensor, dict]:
        if not self.overhead_printed:
            self.overhead_printed = True
            self.print_overhead(model, idx, targets)
        return self.loss(model, idx, targets)

    def loss(self, model: GPT, idx: Tensor, targets: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        x, head = model.states(idx)
        _, loss = head.loss(x, targets)
        with torch.no_grad():
            known = [teacher.states(idx) for teacher in self.teachers]
        rows, T = idx.shape
        width = (model.config.loss_chunk or rows * T) // rows or 1  # positions in a chunk
        parts = []
        for i in range(0, T, width):
            pairs = [(y[:, i : i + width], head_at(h, i, i + width)) for y, h in [(x, head), *known]]
            parts.append(checkpoint(self.divergence, pairs, targets[:, i : i + width], use_reentrant=False))
        kl = torch.stack(parts).sum() / (targets >= 0).sum().clamp(min=1)
        c = self.config
        return (1 - c.alpha) * loss + c.alpha * c.temperature**2 * kl, {"loss": loss, "kl": kl}

    def divergence(self, pairs: list[tuple], targets: Tensor) -> Tensor:
        """KL(teachers || model), summed over positions; pairs: states and head of the model, then of each."""
        logits = [head(x) for x, head in pairs]
        logits = [x.to(torch.promote_types(x.dtype, torch.float32)) / self.config.temperature for x in logits]
        own, taught = logits[0].log_softmax(-1), torch.stack(logits[1:]).mean(dim=0).log_softmax(-1)
        kl = F.kl_div(own, taught, reduction="none", log_target=True).sum(dim=-1)
        return (kl * (targets >= 0)).sum()

    def print_overhead(self, model: GPT, idx: Tensor, targets: Tensor) -> None:
        """Print how much longer forward and backward pass take than without a teacher."""
        ways = {"plain": lambda: model(idx, targets)[1], "own": lambda: self.loss(model, idx, targets)[0]}
        seconds, params = {name: [] for name in ways}, [p for p in model.parameters() if p.requires_grad]
        with torch.random.fork_rng():  # dropout must not depend on whether a run was resumed
            for _ in range(4):
                for name, loss in ways.items():
                    began = time.perf_counter()
                    torch.autograd.grad(loss(), params)[0].sum().item()  # waits for the device
                    seconds[name].append(time.perf_counter() - began)
        plain, own = (statistics.median(times[1:]) for times in seconds.values())
        print0(
            f"teacher  {self.config.teacher}: forward and backward pass take {own / plain:.1f} times as long"
        )


def head_at(head, start: int, stop: int):
    """The head for the states of these positions only."""
    return head._replace(copies=head.copies.slice(start, stop)) if hasattr(head, "copies") else head
