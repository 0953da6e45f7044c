"""
One HTML file that writes stories in any current browser, offline: weights, tokenizer, engine and page.

    source = checkpoint.find("out/tiny")
    html.export(*checkpoint.build(source), source, "story.html")

The folder page/ has what is put into the HTML file as it is: the page (index.html, style.css, page.js) and
the engine, which runs in a Worker (model.js, engine.js). The model stands beside them as data. Matrices are
stored in int8 with a scale for each row (fast_decoding.quantize_rows), vectors in float32.
"""

import base64
import copy
import datetime
import json
import re
import shlex
from dataclasses import asdict
from html import escape
from pathlib import Path

import torch
from torch import nn

from model import GPT
from nanostlm import tasks, toystories
from nanostlm.data import Data, load_data
from nanostlm.fast_decoding import quantize_rows
from nanostlm.formats import refuse, unsupported
from nanostlm.generate import DEFAULTS
from nanostlm.schema import TEXT, read_json
from nanostlm.tokenizer import Tokenizer

FOLDER = Path(__file__).with_name("page")
SUPPORTED = dict(  # a component that is new in model.py is refused until the engine has it
    causal=[True],
    norm=["rmsnorm", "layernorm", "none"],
    position=["rope", "learned", "sinusoidal", "shaw", "alibi", "none"],
    mlp=["swiglu", "geglu", "gelu", "gelu_tanh", "relu", "relu2", "silu", "tanh", "leaky_relu"],
    share=["none", "mlp", "layers", "lora"],
)
EVAL_TOKENS = 65_536  # of the validation file, for the bits per byte of the card
TRAINING = ("dropout", "init", "z_loss", "label_smoothing", "pointer_loss", "loss_chunk")


def to_html(
    model: GPT, tokenizer: Tokenizer, path: str | Path, card: dict[str, str], title: str, toys: bool = False
) -> int:
    """
    Write the page and return its size in bytes. `card` is shown below the story: label -> text. With `toys`,
    it checks stories against the grammar of toystories. ValueError if the engine does not support a setting.
    """
    about = f"A story model of {parameters(model)} parameters that runs in this page, offline."
    data = describe(model, tokenizer) | {"card": card, "about": about, "sampling": DEFAULTS}
    data |= {"grammar": compact(toystories.GRAMMAR)} if toys else {}
    parts = {
        "title": escape(title),
        "model.json": json.dumps(data, ensure_ascii=False).replace("<", "\\u003c"),  # no </script> inside
        "weights": base64.b64encode(pack(model)[1]).decode(),
    }
    parts |= {} if toys else {"toystories.js": ""}

    def part(match: re.Match) -> str:
        name = match[1]
        return parts[name] if name in parts else (FOLDER / name).read_text(encoding="utf-8")

    page = re.sub(r"{{(.+?)}}", part, (FOLDER / "index.html").read_text(encoding="utf-8"))
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
    return path.stat().st_size


def export(model: GPT, tokenizer: Tokenizer, state: dict, source: Path, dest: str | Path) -> str:
    """
    Write the page of a model with its card, from what checkpoint.build(source) returns. Return a line that
    tells the size of the file and the bits per byte.
    """
    refuse(unsupported(model.config, SUPPORTED), "the page's engine")  # before the evaluation
    c, trained = model.config, state.get("train_config", {})
    rows = {
        "Parameters": f"{parameters(model)} ({c.n_layer} layers, {c.n_head} heads, width "
        f"{c.n_embd}, context of {c.block_size} tokens), in int8",
        "Data": trained.get("dataset", "unknown"),
        "Tokenizer": f"{tokenizer.name} ({tokenizer.vocab_size:,} tokens)",
    }
    note = "no validation stories here for bits per byte"
    if (data := validation_data(trained, tokenizer)) is not None:
        rows["Data"] += f", {data.meta['train']['stories']:,} stories"
        exact = tasks.validation_loss(model, data, limit=EVAL_TOKENS)[1]
        rounded = tasks.validation_loss(dequantize(copy.deepcopy(model)), data, limit=EVAL_TOKENS)[1]
        note = f"bits per byte: {exact:.4f} in float32, {rounded:.4f} with the int8 weights"
        rows["Bits per byte"] = f"{rounded:.4f} on validation stories ({exact:.4f} before rounding to int8)"
    if "step" in state:
        rows["Updates"] = f"{state['step']:,}"
    rows["Date"] = datetime.date.fromtimestamp(source.stat().st_mtime).isoformat()
    if (log := source.parent / "config.json").is_file():
        command = read_json(log, {"command?": [TEXT]}).get("command")
        rows |= {"Command": f"python {shlex.join(command)}"} if command else {}
    size = to_html(
        model, tokenizer, dest, rows, source.parent.name or source.stem, rows["Data"].startswith("toystories")
    )
    return f"{dest}: {size / 1e6:.1f} MB, opens in any browser; {note}"


def parameters(model: GPT) -> str:
    return f"{model.config.estimate()['parameters'] / 1e6:.1f}M"


def validation_data(trained: dict, tokenizer: Tokenizer) -> Data | None:
    """The data that a model was trained on, if it is still there."""
    folder = Path(*(trained.get(name, "") for name in ("data_dir", "dataset", "tokenizer")))
    if not trained or not (folder / "meta.json").is_file():
        return None
    return load_data(folder, trained.get("stories", 0), tokenizer)


def describe(model: GPT, tokenizer: Tokenizer) -> dict:
    """What the engine's `load` takes, except for the weights: plain data."""
    refuse(unsupported(model.config, SUPPORTED), "the page's engine")
    config = {name: value for name, value in asdict(model.config).items() if name not in TRAINING}
    tokens = " ".join(base64.b64encode(token).decode() for token in tokenizer.tokens[: tokenizer.eot])
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
def dequantize(model: nn.Module) -> nn.Module:
    """Round the weights of `model`, in place, to those that the page computes with; return it."""
    for p in model.parameters():
        if p.ndim == 2:
            weight, scale = quantize_rows(p)
            p.copy_(weight * scale.float()[:, None])
    return model


def compact(grammar: toystories.Grammar) -> dict:
    """A grammar as plain data for toystories.js, which explains it; equal choices are stored once."""
    n, rows, lists, choices = len(grammar.columns), {}, {}, {}

    def index(table: dict, value) -> int:
        return table.setdefault(json.dumps(value, ensure_ascii=False), len(table))

    def row(cells: tuple) -> int:  # without the columns with a capital letter
        return index(rows, [[row(option) for option in x] if type(x) is tuple else x for x in cells[:n]])

    def operation(op):
        if type(op) is str:
            return op
        if type(op) is toystories.Ref:
            return [op.var, op.column]
        if type(op) is toystories.Choice:
            return index(choices, [[*map(operation, ops)] for ops in op.alternatives])
        ref = type(op.source) is toystories.Ref
        source = operation(op.source) if ref else index(lists, [*map(row, op.source)])
        return [op.var, op.column, source, op.rivals]

    start = operation(grammar.start)
    tables = {"rows": rows, "lists": lists, "choices": choices}
    return {name: [json.loads(key) for key in t] for name, t in tables.items()} | {
        "start": start,
        "columns": n,
    }
