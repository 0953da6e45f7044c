"""
Checkpoint formats of other programs, one file each for reading and writing.

An export gives the same logits and token ids in the other program; otherwise `refuse` raises an error that
names the unsupported settings. This file has the functions that all formats share.
"""

import re
from dataclasses import replace

import torch

from model import GATES, GPT, MLPS, GPTConfig
from nanostlm.variants import merge_lora, sinusoids

# The settings of GPTConfig that matter to other programs, with the values that they support.
ANY = None  # every value
UNGATED = [mlp for mlp in MLPS if mlp not in GATES]
COMMON = dict(causal=[True], pointer=[False], embed_norm=[False], softcap=[0], window=[0], qk_norm=[False])
LLAMA = COMMON | dict(norm=["rmsnorm"], position=["rope"], mlp=[*GATES])


def unsupported(c: GPTConfig, supported: dict) -> list[str]:
    """Return the settings, as "name=value", whose values are not among the supported ones."""
    c = replace(
        c,
        n_kv_head=0 if c.n_kv_head == c.n_head else c.n_kv_head,
        window=0 if c.window >= c.block_size else c.window,
    )
    return [
        f"{name}={getattr(c, name)}"
        for name, values in supported.items()
        if values is not ANY and getattr(c, name) not in values
    ]


def refuse(names: list[str], where: str) -> None:
    """Raise a ValueError if there are any names."""
    if names:
        raise ValueError(f"{', '.join(names)} {'have' if names[1:] else 'has'} no equivalent in {where}")


def plain(model: GPT, **changes) -> GPT:
    """
    Return an equal model with the given settings, without weight sharing and with LoRA merged. Parameters
    that `model` lacks have no effect: norm weights are 1 and biases 0; learned positions are the sinusoids if
    its position is "sinusoidal", and 0 if it is "none".
    """
    c = model.config
    equal = GPT(replace(c, share="none", n_kv_head=c.kv_heads, mlp_hidden=c.hidden, **changes)).eval()
    state = merge_lora(model.state_dict(), equal.state_dict())
    if equal.config.position != c.position:
        table = sinusoids(torch.arange(c.block_size), c.n_embd, c.rope_theta)
        state["embedder.positions.weight"] = table * (c.position == "sinusoidal")
    missing, unknown = equal.load_state_dict(state, strict=False)
    odd = unknown + [name for name in missing if not re.search(r"\.bias$|norm\d?\.weight$", name)]
    refuse(odd[:1], "a model of model.py's own modules")
    return equal
