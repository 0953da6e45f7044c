"""
Research ideas behind the interface of GPT, one file each. `architecture = "NAME"` in a recipe selects
experiments/NAME.py, which has

    Config          a dataclass of settings, with block_size, vocab_size, dropout and validate()
    Model(config)   called like GPT: model(idx) -> (logits, None), model(idx, targets) -> (None, loss)

README.md shows a minimal one. Config may also have estimate() and memory(), as in GPTConfig; the model may
have new_cache(rows) for generation without recomputing the text.

`objective = "NAME"` selects a file with

    Config          a dataclass of settings, with validate()
    Objective(config, model, data)   a subclass of the one here: what training minimizes
"""

import functools
import importlib
import re
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path

import torch
from torch import Tensor, nn

from model import GPT, GPTConfig

FOLDER = Path(__file__).parent


class Objective:
    """
    What training minimizes; here the cross-entropy. `self.config` has its own settings, `self.train_config`
    those of train.py.
    """

    special: tuple[str, ...] = ()  # texts of ids that the tokenizer gets, after end-of-text

    def __init__(self, config, model: nn.Module, data):
        self.config, self.train_config, self.model, self.data = config.objective_config, config, model, data

    def __call__(self, model, idx: Tensor, targets: Tensor, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """
        The loss of a micro-batch to minimize, and its terms for metrics.jsonl by name, among them "loss": the
        mean cross-entropy in nats. Call `model`, not `self.model`: it may be wrapped.
        """
        loss = model(idx, targets)[1]
        return loss, {"loss": loss}

    def batch(self, step: int) -> Iterable[tuple[Tensor, Tensor]] | None:
        """The micro-batches (idx, targets) of this process at a step; None: those of the data."""
        return None

    def prepare_model(self, model: nn.Module) -> None:
        """Change the modules of the model, before the optimizers are built."""

    def state_dict(self) -> dict:
        """Tensors and plain data that a bit-exact resume needs."""
        return {}

    def load_state_dict(self, state: dict) -> None:
        """Restore what state_dict returned."""


class Minimized(nn.Module):
    """The model as train_step calls it with an objective: one forward pass, for DistributedDataParallel."""

    def __init__(self, objective: Objective, model: nn.Module):
        super().__init__()
        self.objective, self.model = objective, model

    def forward(self, idx: Tensor, targets: Tensor, step: int) -> tuple[dict[str, Tensor], Tensor]:
        loss, parts = self.objective(self.model, idx, targets, step)
        return parts, loss


class Defaults:
    """What the scripts read of a configuration besides its settings, where the architecture does not say."""

    causal, separator, position = True, -1, "none"
    compiles = False  # True: the shapes of all tensors follow from that of the ids, for torch.compile
    n_layer = n_embd = kv_heads = head_dim = 0

    def estimate(self) -> dict[str, int]:
        """As in GPTConfig: 6 FLOPs per weight outside embeddings; activations are not counted."""
        with torch.device("meta"):
            model = architecture(name_of(self))[1](self)
        total = sum(p.numel() for p in model.parameters())
        tables = {m.weight for m in model.modules() if isinstance(m, nn.Embedding)}
        embedding = sum(p.numel() for p in tables)
        flops = 6 * (total - embedding)
        counts = {"parameters": total, "embedding_parameters": embedding, "flops_per_token": flops}
        return counts | {"activations_per_token": 0}

    def memory(self, tokens: int, itemsize: int) -> int:
        """Approximate bytes to train on micro-batches of `tokens` tokens; as in GPTConfig."""
        counts, states = self.estimate(), 16 + 2 * itemsize * (itemsize < 4)
        per_token = (itemsize + 2) * counts["activations_per_token"] + (8 + itemsize) * self.vocab_size
        return states * counts["parameters"] + per_token * tokens


def architectures() -> list[str]:
    """The names of the architectures: gpt, and the files in experiments/ with a Config and a Model."""
    return ["gpt", *files_with("Config", "Model")]


def objectives() -> list[str]:
    """The names of the objectives: the files in experiments/ with a Config and an Objective."""
    return files_with("Config", "Objective")


def files_with(*names: str) -> list[str]:
    """The files in experiments/ that define all of these classes in this order, without their suffix."""
    wanted = re.compile(".*".join(rf"^class {name}\b" for name in names), re.M | re.S)
    files = (file for file in sorted(FOLDER.glob("*.py")) if file.stem != "__init__")
    return [file.stem for file in files if wanted.search(file.read_text(encoding="utf-8"))]


@functools.cache
def architecture(name: str) -> tuple[type, type[nn.Module]]:
    """The classes of configuration and model. ValueError unless `name` is one of `architectures`."""
    if name == "gpt":
        return GPTConfig, GPT
    if name not in architectures():
        raise ValueError(f"architecture must be one of {', '.join(architectures())}; not {name!r:.60}")
    module = importlib.import_module(f"experiments.{name}")
    bases = (module.Config, Defaults)
    return type("Config", bases, {"__module__": module.__name__, "__doc__": module.__doc__}), module.Model


def objective(name: str) -> tuple[type, type[Objective]]:
    """The classes of configuration and objective. ValueError unless `name` is one of `objectives`."""
    if name not in objectives():
        raise ValueError(f"objective must be one of {', '.join(objectives())}; not {name!r:.60}")
    module = importlib.import_module(f"experiments.{name}")
    return module.Config, module.Objective


def name_of(x: object) -> str:
    """The name of the architecture of a model or a configuration."""
    package, _, name = type(x).__module__.rpartition(".")
    return name if package == "experiments" else "gpt"


def check(c) -> None:
    """ValueError if a TrainConfig asks an experiment for something that only GPT or plain training can do."""
    if c.objective:
        c.objective_config.validate()
        if c.compile == "True":
            raise ValueError(f"leave out compile: objective={c.objective} is not made for it")
    if c.architecture == "gpt":
        return
    if c.compile == "True" and not getattr(c.model, "compiles", False):
        raise ValueError(f"leave out compile: architecture={c.architecture} is not made for it")
    if c.pair_tokens:
        raise ValueError(f"leave out pair_tokens: architecture={c.architecture} has no bigram initialization")
    if not c.cross_stories and "separator" not in {field.name for field in fields(c.model)}:
        raise ValueError(f"leave out cross_stories: architecture={c.architecture} has no document masking")
