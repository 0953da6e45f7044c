"""
Preferences: a model learns to prefer, after the same prompt, a chosen continuation to a rejected one.

    python train.py --objective=prefer --init_from=out/tiny --pairs=prefer.jsonl --learning_rate=2e-4 ...

A line of prefer.jsonl is {"prompt": TEXT, "chosen": TEXT, "rejected": TEXT}; self_play.py makes such files.
The loss is the preference term, plus `likelihood` times the cross-entropy of the chosen continuation, whose
likelihood may otherwise fall while the margin grows. The preference term is the mean over pairs of

    dpo            -log sigmoid(beta * margin); margin = log pi(y) - log ref(y) - (log pi(y') - log ref(y'))
    unlikelihood   -log(1 - pi(t)), t the first wrong token of the rejected continuation

pi is the model that is trained, ref the model as it was before the first update, y the chosen and y' the
rejected continuation, both with end-of-text. dpo: Rafailov et al. 2023, arXiv 2305.18290; if y' comes from
ref itself, it is SPIN, arXiv 2401.01335. unlikelihood: Welleck et al. 2019, arXiv 1908.04319. The first wrong
token is the one with character number `wrong` of the rejected text, one more field of a line; the length of
the text stands for end-of-text.

batch_size counts pairs. metrics.jsonl has `loss`, the cross-entropy of the chosen continuation in nats per
token; `preference`; and for dpo the mean `margin` in nats, and `accuracy`, the share of positive margins.
"""

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import experiments
from model import GPT, check_settings, cross_entropy
from nanostlm import machine, settings
from nanostlm.data import Batches
from nanostlm.schema import TEXT, WHOLE, check, naming

PAIR = {"prompt": TEXT, "chosen": TEXT, "rejected": TEXT, "wrong?": WHOLE}


@dataclass(frozen=True)
class Config:
    pairs: str = ""  # the file of pairs, prefer.jsonl
    preference: str = "dpo"  # dpo | unlikelihood (of the first wrong token of a rejected text)
    beta: float = 0.1  # of dpo: how much a margin counts
    likelihood: float = 1.0  # weight of the cross-entropy of the chosen continuation

    def validate(self) -> None:
        check_settings(self, {"beta": (1e-6, 10**3)}, {"preference": ["dpo", "unlikelihood"]})
        settings.check_path("pairs", self.pairs, "file")
        if not Path(self.pairs).is_file():
            raise FileNotFoundError(f"there is no file {self.pairs}: experiments/self_play.py makes one")


def read_pairs(path: str) -> tuple[list[dict], str]:
    """The pairs of a file, and its SHA-256. ValueError names the file and the line."""
    pairs, data = [], Path(path).read_bytes()
    for number, line in enumerate(data.split(b"\n"), 1):
        if line.strip():
            with naming(f"{path}, line {number}"):
                pair = json.loads(line)
                check(pair, PAIR)
                if (pair.get("wrong") or 0) > len(pair["rejected"]):
                    raise ValueError(f"wrong={pair['wrong']} is past the end of the rejected text")
            pairs.append(pair)
    return pairs, hashlib.sha256(data).hexdigest()


def encode(tokenizer, prompt: str, text: str, wrong: int | None = None) -> Tensor:
    """
    A row, int64 (2, T): idx and targets of end-of-text, the prompt, the text and end-of-text. Targets are -1
    on the prompt. With `wrong`, the row ends at the token of this character of the text, the only target.
    """
    before, ids = [tokenizer.eot, *tokenizer.encode(prompt)], tokenizer.encode(text)
    ends = np.cumsum([len(tokenizer.decode_bytes([i])) for i in ids])
    ids, scored = [*ids, tokenizer.eot], 0
    if wrong is not None:
        scored = int(np.searchsorted(ends, len(text[:wrong].encode()), side="right"))
        ids = ids[: scored + 1]
    targets = [-1] * (len(before) - 1 + scored) + ids[scored:]
    return torch.tensor([[*before, *ids[:-1]], targets])


def token_nll(model: nn.Module, idx: Tensor, targets: Tensor) -> Tensor:
    """-log p of targets (B, T), 0 where they are -1: (B, T), float32, with gradients."""
    if not isinstance(model, GPT):
        return cross_entropy(model(idx)[0], targets, reduction="none").view_as(targets)
    x, head = model.states(idx)
    copies = getattr(head, "copies", None)  # mixing whole distributions would take three times as long
    nll = cross_entropy((head if copies is None else head.head)(x), targets, reduction="none")
    if copies is not None:
        generate, copied, _ = copies.probs(targets)
        nll = -torch.logaddexp(generate - nll, copied) * (targets.flatten() >= 0)
    return nll.view_as(targets)


class Objective(experiments.Objective):
    def __init__(self, config, model: nn.Module, data):
        super().__init__(config, model, data)
        c, T, tokenizer = self.config, config.model.block_size, data.tokenizer
        refused = {
            "objective=prefer starts from a trained model: add --init_from=RUN": not config.init_from,
            "leave out context_schedule: objective=prefer has rows of any length": config.context_schedule,
            "objective=prefer needs causal=True": not getattr(config.model, "causal", True),
        }
        for message, holds in refused.items():
            if holds:
                raise ValueError(message)
        pairs, self.digest = read_pairs(c.pairs)
        self.dpo = c.preference == "dpo"
        marked = [pair for pair in pairs if self.dpo or pair.get("wrong") is not None]
        self.rows = []  # (chosen, rejected) of each pair
        for pair in marked:
            chosen = encode(tokenizer, pair["prompt"], pair["chosen"])
            rejected = encode(
                tokenizer, pair["prompt"], pair["rejected"], None if self.dpo else pair["wrong"]
            )
            if max(chosen.shape[1], rejected.shape[1]) <= T:
                self.rows.append((chosen, rejected))
        found = f"{c.pairs}: {len(self.rows):,} of {len(pairs):,} pairs are used; "
        found += f"{len(pairs) - len(marked):,} have no wrong character, " * (not self.dpo)
        found += f"{len(marked) - len(self.rows):,} are longer than block_size={T}"
        if not self.rows:
            raise ValueError(found)
        machine.print0(f"pairs    {found}")
        self.order = Batches(  # windows of one token stand for pairs
            np.empty(len(self.rows) + 1),
            -1,
            block_size=1,
            batch_size=config.batch_size,
            gradient_accumulation_steps=config.gradient_accumulation_steps,
            seed=config.seed,
            rank=machine.rank(),
            world_size=machine.world_size(),
        )
        self.reference: Tensor | None = None  # -log ref(y) and -log ref(y'), (pairs, 2), in nats

    def batch(self, step: int) -> Iterator[tuple[Tensor, Tensor]]:
        return map(self.collate, self.order.windows(step)[0])

    def collate(self, pairs: np.ndarray) -> tuple[Tensor, Tensor]:
        """
        idx and targets of n pairs, int64 (2n, T): chosen rows, then rejected ones, padded on the right. The
        attribute `pairs` of targets has their numbers, because the reference is looked up by them.
        """
        rows = [self.rows[i][side] for side in (0, 1) for i in pairs]
        device = next(self.model.parameters()).device
        idx, targets = (
            pad_sequence([row[k] for row in rows], batch_first=True, padding_value=fill).to(device)
            for k, fill in enumerate((self.data.tokenizer.eot, -1))
        )
        targets.pairs = torch.from_numpy(pairs).to(device)
        return idx, targets

    def __call__(self, model, idx: Tensor, targets: Tensor, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        c, n = self.config, len(idx) // 2
        if self.dpo and self.reference is None:
            self.reference = self.score(model)
        nll = token_nll(model, idx, targets)
        loss, parts = nll[:n].sum() / (targets[:n] >= 0).sum(), {}
        if self.dpo:
            gain = self.reference[targets.pairs].T - nll.sum(1).view(2, n)  # log pi - log ref
            margin = gain[0] - gain[1]
            preference = -F.logsigmoid(c.beta * margin).mean()
            parts = {"margin": margin.mean(), "accuracy": (margin > 0).to(margin.dtype).mean()}
        else:
            wrong = nll[n:].sum(1).clamp(min=1e-6)  # its only target; the loss of a certain token is infinite
            preference = -torch.log(-torch.expm1(-wrong)).mean()
        return preference + c.likelihood * loss, {"loss": loss, "preference": preference} | parts

    @torch.no_grad()
    def score(self, model) -> Tensor:
        """The `reference` of a model, in micro-batches like those of training."""
        training, found = model.training, []
        model.eval()
        n = len(self.rows)
        batches = np.array_split(np.arange(n), math.ceil(n / self.train_config.batch_size))
        for pairs in tqdm(batches, desc="reference", unit="batch", disable=None):
            found.append(token_nll(model, *self.collate(pairs)).sum(1).view(2, len(pairs)).T)
        model.train(training)
        return torch.cat(found)

    def state_dict(self) -> dict:
        """The reference is in it once there is one: before the first update, the model is the reference."""
        state = {"pairs": self.digest}
        return state if self.reference is None else state | {"reference": self.reference.cpu()}

    def load_state_dict(self, state: dict) -> None:
        if state["pairs"] != self.digest:
            raise ValueError(f"{self.config.pairs} has changed since the run began")
        if "reference" in state:
            self.reference = state["reference"].to(next(self.model.parameters()).device)
