"""
One HTML file that writes stories in any current browser, offline: weights, tokenizer, engine and page.

    html.to_html(model, tokenizer, "story.html", card={"Data": "toystories"}, title="tiny")

The engine (engine.js) and the page (page.html, page.css, page.js) are files of their own in this folder; they
are put into the HTML file as they are, and the model beside them as data. Matrices are stored in int8 with a
scale for each row (generate.quantize_rows), vectors in float32.
"""

import base64
import json
import re
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn

from model import GPT
from nanostlm.formats import ANY, refuse, unsupported
from nanostlm.generate import quantize_rows
from nanostlm.tokenizer import Tokenizer

FOLDER = Path(__file__).parent
SUPPORTED = dict(  # a component that is new in model.py is refused until the engine has it
    causal=[True],
    norm=["rmsnorm", "layernorm", "none"],
    position=["rope", "learned", "sinusoidal", "shaw", "alibi", "none"],
    mlp=["swiglu", "geglu", "gelu", "gelu_tanh", "relu", "relu2", "silu", "tanh", "leaky_relu"],
    share=["none", "mlp", "layers", "lora"],
    pointer=ANY,
)
TRAINING = ("dropout", "init", "z_loss", "label_smoothing", "pointer_loss", "loss_chunk")


def to_html(model: GPT, tokenizer: Tokenizer, path: str | Path, card: dict[str, str], title: str) -> int:
    """
    Write the page and return its size in bytes. `card` is shown below the story: label -> text. ValueError
    if the engine does not support a setting.
    """
    page = (FOLDER / "page.html").read_text(encoding="utf-8")
    parts = {name: (FOLDER / name).read_text(encoding="utf-8") for name in ("page.css", "page.js", "engine.js")}
    parts |= {
        "title": title.replace("&", "&amp;").replace("<", "&lt;"),
        "model.json": embedded(describe(model, tokenizer) | {"card": card, "title": title}),
        "weights": base64.b64encode(pack(model)[1]).decode(),
    }
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(re.sub(r"{{(.+?)}}", lambda match: parts[match[1]], page), encoding="utf-8")
    return path.stat().st_size


def embedded(data: dict) -> str:
    """JSON for a script element, which ends at the first </script>."""
    return json.dumps(data, ensure_ascii=False).replace("<", "\\u003c")


def describe(model: GPT, tokenizer: Tokenizer) -> dict:
    """What the engine's `load` takes, except for the weights: plain data."""
    refuse(unsupported(model.config, SUPPORTED), "the page's engine")
    config = {name: value for name, value in asdict(model.config).items() if name not in TRAINING}
    tokens = " ".join(base64.b64encode(token).decode() for token in tokenizer.tokens[:-1])
    return {"config": config, "tokens": tokens, "tensors": pack(model)[0]}


def pack(model: GPT) -> tuple[dict[str, list[int]], bytes]:
    """
    The tensors by their names in the state_dict, as [offset, rows, columns], and their bytes: row scales in
    float32 and then the matrix in int8, or a vector in float32 (columns = 0). Shared ones are stored once.
    """
    tensors, data, offsets = {}, bytearray(), {}
    for name, p in model.named_parameters(remove_duplicate=False):
        if name == "head.linear.weight" and model.config.tied:
            continue
        rows, columns = (*p.shape, 0, 0)[:2] if p.ndim == 2 else (p.numel(), 0)
        if name in ("embedder.tokens.weight", "head.linear.weight"):
            rows = model.config.vocab_size  # without the padding
        if p not in offsets:
            offsets[p] = len(data)
            if columns:
                weight, scale = quantize_rows(p[:rows])
                data += scale.float().numpy().astype("<f4").tobytes() + weight.numpy().tobytes()
            else:
                data += p.detach().float().numpy().astype("<f4").tobytes()
            data += bytes(-len(data) % 4)
        tensors[name] = [offsets[p], rows, columns]
    return tensors, bytes(data)


@torch.no_grad()
def dequantize(model: nn.Module) -> None:
    """Round the weights of `model`, in place, to those that the page computes with."""
    for p in model.parameters():
        if p.ndim == 2:
            weight, scale = quantize_rows(p)
            p.copy_(weight * scale.float()[:, None])
