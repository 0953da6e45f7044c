"""
Our models in the formats of other programs, and theirs in ours.

    python export.py --to hf out/tiny-hf           # a folder for AutoModelForCausalLM and AutoTokenizer
    python export.py --to llama2c out/tiny.bin     # for llama2.c's run.c; tokenizer.bin is put beside it
    python train.py config/finetune.py --init_from=hf:out/tiny-hf    # the way back; or a Hub id: hf:gpt2

An export gives the same logits there and the same tokens, or it is refused with the name of the setting that
has no equivalent. Shared layers are written out, LoRA is merged, the vocabulary's padding is left out.
`from_hf` reads what `to_hf` writes, and what others made for the same classes.
"""

import argparse
import json
import re
import struct
import sys
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import safetensors.torch
import torch
from torch import Tensor, nn

from model import GATES, GPT, MLPS, GPTConfig, rope_table
from nanostlm import checkpoint
from nanostlm import tokenizer as tokenizers
from nanostlm.tokenizer import EOT, Tokenizer, Unreachable
from nanostlm.variants import LoRA, sinusoids

# ----------------------------------------------------------------------------------------------------------
# Which settings another program knows, and how it calls them

PLAIN = [mlp for mlp in MLPS if mlp not in GATES]
COMMON = dict(causal=[True], pointer=[False], embed_norm=[False], softcap=[0], window=[0], qk_norm=[False])
ROTARY = COMMON | dict(norm=["rmsnorm"], position=["rope"], mlp=[*GATES])
ANY = None  # for every value there is an equivalent
RUN_C = ROTARY | dict(mlp=["swiglu"], bias=[False], norm_eps=[1e-5], rope_theta=[10000])  # hard-coded there

KEYS = {"hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head",
        "num_key_value_heads": "n_kv_head", "intermediate_size": "mlp_hidden", "vocab_size": "vocab_size",
        "rms_norm_eps": "norm_eps", "max_position_embeddings": "block_size",
        "tie_word_embeddings": "tied"}  # fmt: skip
BIASES = {"attention_bias": "bias", "mlp_bias": "bias"}
GPT2_KEYS = {"n_embd": "n_embd", "n_layer": "n_layer", "n_head": "n_head", "n_inner": "mlp_hidden",
             "vocab_size": "vocab_size", "layer_norm_epsilon": "norm_eps", "n_positions": "block_size",
             "tie_word_embeddings": "tied"}  # fmt: skip
OPTIONAL = ("n_kv_head", "mlp_hidden", "window", "softcap", "tied", "bias")  # may be missing or null

OUTER = {"embedder.tokens": "model.embed_tokens", "head.norm": "model.norm", "head.linear": "lm_head"}
GPT2_OUTER = {"embedder.tokens": "transformer.wte", "embedder.positions": "transformer.wpe",
              "head.norm": "transformer.ln_f", "head.linear": "lm_head"}  # fmt: skip
GATED = {"norm1": "input_layernorm", "norm2": "post_attention_layernorm",
         "attn.qkv": "self_attn.q_proj self_attn.k_proj self_attn.v_proj", "attn.proj": "self_attn.o_proj",
         "attn.q_norm": "self_attn.q_norm", "attn.k_norm": "self_attn.k_norm",
         "mlp.fc": "mlp.gate_proj mlp.up_proj", "mlp.proj": "mlp.down_proj"}  # fmt: skip
UNGATED = GATED | {"mlp.fc": "mlp.up_proj"}
GPT2 = {"norm1": "ln_1", "attn.qkv": "attn.c_attn", "attn.proj": "attn.c_proj",
        "norm2": "ln_2", "mlp.fc": "mlp.c_fc", "mlp.proj": "mlp.c_proj"}  # fmt: skip

# the names of activations; of several the first is written, all are read
ACTIVATIONS = {"swiglu": ["silu", "swish"], "geglu": ["gelu"], "gelu": ["gelu"], "relu": ["relu"],
               "gelu_tanh": ["gelu_new", "gelu_pytorch_tanh", "gelu_fast"], "silu": ["silu", "swish"],
               "relu2": ["relu2"], "tanh": ["tanh"], "leaky_relu": ["leaky_relu"]}  # fmt: skip
ROPE = {"rope_type": "default", "type": "default", "partial_rotary_factor": 1}  # the variant we know
GPT2_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"  # of GPT-2's vocabulary


class Family(NamedTuple):
    """A class of transformers that models of ours are equal to."""

    name: str
    kind: str  # model_type in config.json
    knows: dict  # our settings -> the values that have an equivalent there
    keys: dict = KEYS  # in config.json -> our settings
    fixed: dict = {}  # in config.json -> the one value that we know
    inner: dict = GATED  # our part of a block -> its name there, or several in the order of our rows
    blocks: str = "model.layers"
    outer: dict = OUTER  # the same for what is not in a block
    takes: dict = dict(norm_weight=True)  # settings of a model of ours that has all the weights in its files


FAMILIES = [
    Family("LlamaForCausalLM", "llama", ROTARY, KEYS | BIASES),
    Family("MistralForCausalLM", "mistral", ROTARY | dict(bias=[False], window=ANY),
           KEYS | {"sliding_window": "window"}),
    Family("Qwen3ForCausalLM", "qwen3", ROTARY | dict(bias=[False], window=ANY, qk_norm=[True]),
           KEYS | {"sliding_window": "window"}, dict(attention_bias=False, max_window_layers=0)),
    Family("ArceeForCausalLM", "arcee", ROTARY | dict(mlp=PLAIN), KEYS | BIASES, inner=UNGATED),
    Family("NanoChatForCausalLM", "nanochat",
           ROTARY | dict(mlp=PLAIN, bias=[False], qk_norm=[True], norm_weight=[False], embed_norm=[True],
                         softcap=ANY),
           KEYS | {"final_logit_softcapping": "softcap"}, dict(attention_bias=False),
           UNGATED | {"mlp.fc": "mlp.fc1", "mlp.proj": "mlp.fc2"}, takes={}),
    Family("ApertusForCausalLM", "apertus", ROTARY | dict(mlp=PLAIN, bias=[False], qk_norm=[True]),
           fixed=dict(attention_bias=False),
           inner=UNGATED | {"norm1": "attention_layernorm", "norm2": "feedforward_layernorm"}),
    Family("GPT2LMHeadModel", "gpt2",
           COMMON | dict(norm=["layernorm"], position=["learned", "sinusoidal", "none"], mlp=PLAIN,
                         n_kv_head=[0]),
           GPT2_KEYS,
           dict(scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False),
           GPT2, "transformer.h", GPT2_OUTER, dict(norm_weight=True, bias=True, position="learned")),
]  # fmt: skip


def misfits(c: GPTConfig, knows: dict) -> list[str]:
    """The settings, as name=value, that have no equivalent in what knows these values."""
    c = replace(c, n_kv_head=0 if c.n_kv_head == c.n_head else c.n_kv_head,
                window=0 if c.window >= c.block_size else c.window)  # fmt: skip
    return [f"{name}={getattr(c, name)}" for name, values in knows.items()
            if values is not ANY and getattr(c, name) not in values]  # fmt: skip


def refuse(found: list[str], where: str) -> None:
    if found:
        raise ValueError(f"{', '.join(found)} {'have' if found[1:] else 'has'} no equivalent in {where}")


# ----------------------------------------------------------------------------------------------------------
# Weights


def plain(model: GPT, **takes) -> GPT:
    """
    An equal model whose layers share nothing, with these settings. What it has beyond the weights of `model`
    changes nothing: norm weights are 1, biases 0, learned positions the sinusoids, or 0 if there were none.
    """
    c, state = model.config, model.state_dict()
    for name, part in model.named_modules(remove_duplicate=False):
        if isinstance(part, LoRA):
            state = {key: value for key, value in state.items() if not key.startswith(name + ".")}
            state |= {f"{name}.{leaf}": value for leaf, value in part.base.state_dict().items()}
            state[f"{name}.weight"] = (part.base.weight + part.up.weight @ part.down.weight).detach()
    same = GPT(replace(c, share="none", n_kv_head=c.kv_heads, mlp_hidden=c.hidden, **takes)).eval()
    if same.config.position != c.position:
        table = sinusoids(torch.arange(c.block_size), c.n_embd, c.rope_theta)
        state["embedder.positions.weight"] = table * (c.position == "sinusoidal")
    missing, unknown = same.load_state_dict(state, strict=False)
    odd = unknown + [name for name in missing if not re.search(r"\.bias$|norm\d?\.weight$", name)]
    refuse(odd[:1], "a model made of model.py's own parts")
    return same


def views(model: GPT, family: Family) -> Iterator[tuple[str, Tensor]]:
    """
    The name of each tensor in a family's files, and its place in a model of ours that has them all: reading
    from it is an export, writing to it an import. The vocabulary's padding stays out of both.
    """
    c, table = model.config, dict(family.outer)
    if c.tied:
        del table["head.linear"]
    for i in range(c.n_layer):
        for ours, theirs in family.inner.items():
            names = [f"{family.blocks}.{i}.{name}" for name in theirs.split()]
            table[f"core.blocks.{i}.{ours}"] = " ".join(names)
    for ours, theirs in table.items():
        part, names = model.get_submodule(ours), theirs.split()
        sizes = {1: [], 2: 2 * [c.hidden], 3: [c.n_embd, *2 * [c.kv_heads * c.head_dim]]}[len(names)]
        conv1d = family.kind == "gpt2" and isinstance(part, nn.Linear) and ours != "head.linear"
        for leaf, value in part.named_parameters(recurse=False):
            value = value.detach()
            if ours in ("embedder.tokens", "head.linear"):
                value = value[: c.vocab_size]
            for name, rows in zip(names, value.split(sizes or len(value)), strict=True):
                yield f"{name}.{leaf}", rows.t() if conv1d else rows


def swap_halves(name: str, x: Tensor, head_dim: int) -> Tensor:
    """For nanochat, which turns RoPE's pairs the other way round: rows of q and k trade places in them."""
    if not re.search(r"\.[qk]_proj\.", name):
        return x
    return x.unflatten(0, (-1, 2, head_dim // 2)).flip(1).flatten(0, 2)


def neighbours(x: Tensor, head_dim: int) -> Tensor:
    """For run.c, whose RoPE pairs row 2i of each head of q and k with 2i + 1; ours i with i + head_dim/2."""
    return x.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)


# ----------------------------------------------------------------------------------------------------------
# Hugging Face: to a folder


def to_hf(model: GPT, tokenizer: Tokenizer, folder: str | Path) -> str:
    """Write the folder; return the name of the class that it is for. ValueError where none is equal."""
    folder, eot = Path(folder), tokenizer.eot
    family = min(FAMILIES, key=lambda family: len(misfits(model.config, family.knows)))
    refuse(misfits(model.config, family.knows), f"{family.name}, the nearest class of transformers")
    model = plain(model, **family.takes)
    c, tensors = model.config, {}
    for name, view in views(model, family):
        view = swap_halves(name, view, c.head_dim) if family.kind == "nanochat" else view
        tensors[name] = view.clone(memory_format=torch.contiguous_format)
    config = {"architectures": [family.name], "model_type": family.kind, "dtype": str(view.dtype)[6:],
              "bos_token_id": eot, "eos_token_id": eot, "pad_token_id": None, **family.fixed}  # fmt: skip
    config |= {theirs: getattr(c, ours) for theirs, ours in family.keys.items()}
    config["activation_function" if family.kind == "gpt2" else "hidden_act"] = ACTIVATIONS[c.mlp][0]
    if c.position == "rope":
        rope = {"rope_type": "default", "rope_theta": c.rope_theta}
        config |= {"rope_parameters": rope, "rope_theta": c.rope_theta, "head_dim": c.head_dim}
    if "sliding_window" in config:
        config |= {"sliding_window": c.window or None, "use_sliding_window": bool(c.window)}
    if "final_logit_softcapping" in config:
        config["final_logit_softcapping"] = c.softcap or None
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(folder / "tokenizer.json")
    splits = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    files = {
        "tokenizer.json": splits | {"post_processor": eot_first(eot)},
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": EOT, "eos_token": EOT,
            "model_max_length": c.block_size, "clean_up_tokenization_spaces": False,
            "split_special_tokens": True,  # no text turns into end-of-text
        },
        "generation_config.json": {"bos_token_id": eot, "eos_token_id": eot, "pad_token_id": eot},
        "config.json": config,
    }  # fmt: skip
    for name, data in files.items():
        (folder / name).write_text(json.dumps(data, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    (folder / "model.safetensors").write_bytes(safetensors.torch.save(tensors, {"format": "pt"}))
    return family.name


def eot_first(eot: int) -> dict:
    """The post-processor of tokenizer.json that puts end-of-text before a text, or before each of two."""
    pair = [{kind: {"id": what, "type_id": i}} for i, text in enumerate("AB")
            for kind, what in (("SpecialToken", EOT), ("Sequence", text))]  # fmt: skip
    tokens = {EOT: {"id": EOT, "ids": [eot], "tokens": [EOT]}}
    return {"type": "TemplateProcessing", "single": pair[:2], "pair": pair, "special_tokens": tokens}


# ----------------------------------------------------------------------------------------------------------
# Hugging Face: from a folder or the Hub


def from_hf(source: str | Path) -> tuple[GPT, Tokenizer]:
    """
    A folder with config.json, tokenizer.json, model.safetensors, or a Hub id -> (model, tokenizer).
    Ids are ours: end-of-text is the last one, and the only special token. Where another begins a text there,
    the embedding of end-of-text is that one's, and embedding and head are not tied.
    ValueError or FileNotFoundError for what has no equivalent here or is missing, Unreachable for the Hub.
    """
    folder = find(source)
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        tokenizer, ids, begin, end = read_tokenizer(folder / "tokenizer.json", config)
        files, index = ["model.safetensors"], folder / "model.safetensors.index.json"
        if index.exists():
            files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        tensors = {
            name: x for file in files for name, x in safetensors.torch.load_file(folder / file).items()
        }
        family, c = read_config(config, tied="lm_head.weight" not in tensors)
    except FileNotFoundError as error:
        name = Path(error.filename or "model.safetensors").name
        raise FileNotFoundError(f"there is no {name} in {source}") from None
    except (KeyError, TypeError, json.JSONDecodeError, safetensors.SafetensorError) as error:
        raise ValueError(f"{source} is damaged, or no folder of transformers: {error!r}") from None
    first = family.blocks.split(".")[0] + "."  # which is not there in the files of gpt2 itself
    tensors = {n if n.startswith((first, "lm_head.")) else first + n: x for n, x in tensors.items()}
    tokens, head = family.outer["embedder.tokens"] + ".weight", "lm_head.weight"
    if c.tied:
        tensors[head] = tensors.get(tokens)
    model = GPT(replace(c, vocab_size=tokenizer.vocab_size, tied=c.tied and begin == end)).eval()
    for name, view in views(model, family):
        value = tensors.pop(name, torch.empty(0))
        if name in (tokens, head) and len(value) > max(*ids, begin, end):
            value = value[[*ids, begin if name == tokens else end]]
        if value.shape != view.shape:
            raise ValueError(f"{source}: {name} has shape {list(value.shape)}, not {list(view.shape)}")
        view.copy_(swap_halves(name, value, c.head_dim) if family.kind == "nanochat" else value)
    buffers = r"^lm_head\.weight$|\.attn\.(masked_)?bias$|inv_freq$"  # of old files: masks, frequencies
    refuse([name for name in tensors if not re.search(buffers, name)][:1], f"a {family.name}")
    return model, tokenizer


def find(source: str | Path) -> Path:
    """The folder that a path or a Hub id stands for."""
    if Path(source).is_dir():
        return Path(source)
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", str(source)):
        raise FileNotFoundError(f"there is no folder {source}")
    from huggingface_hub import HfApi, constants, snapshot_download
    from huggingface_hub.errors import RepositoryNotFoundError

    wanted = ["config.json", "tokenizer.json", "*.safetensors", "*.safetensors.index.json"]
    try:
        if not constants.HF_HUB_OFFLINE:
            tokenizers.within(4, lambda: HfApi().model_info(str(source), timeout=3))
        return Path(snapshot_download(str(source), allow_patterns=wanted, ignore_patterns=["*/*"]))
    except RepositoryNotFoundError:
        raise ValueError(f"there is no folder {source} here, nor such a model on the Hub") from None
    except Exception as error:
        raise Unreachable(f"{source} is no folder here, and the Hugging Face Hub cannot be reached "
                          f"({type(error).__name__}): give a folder with its files") from None  # fmt: skip


def read_config(config: dict, tied: bool) -> tuple[Family, GPTConfig]:
    """config.json -> its family and our settings, vocab_size as there. `tied` holds where it does not say."""
    family = next((family for family in FAMILIES if family.kind == config["model_type"]), None)
    if family is None:
        kinds = ", ".join(family.kind for family in FAMILIES)
        raise ValueError(f"model_type={config['model_type']} has no equivalent here; there are {kinds}")
    if not config.get("use_sliding_window", True):
        config = config | {"sliding_window": None, "max_window_layers": None}
    found, odd = {}, {}
    for theirs, ours in family.keys.items():
        value = config.get(theirs)
        if value is None and ours not in OPTIONAL:
            raise KeyError(theirs)
        if value is not None and found.setdefault(ours, value) != value:
            odd[theirs] = value  # two settings there are one here
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    activation = config["activation_function" if family.kind == "gpt2" else "hidden_act"]
    mlps = [mlp for mlp in family.knows["mlp"] if activation in ACTIVATIONS[mlp]]
    fixed = family.fixed | {"head_dim": found["n_embd"] // found["n_head"]}
    odd |= {key: config[key] for key, value in fixed.items() if config.get(key) not in (value, None)}
    odd |= {key: rope[key] for key, value in ROPE.items() if rope.get(key, value) != value}
    odd |= {} if mlps else {"hidden_act": activation}
    refuse([f"{key}={value}" for key, value in odd.items()], "model.py")
    known = {name: values[0] for name, values in family.knows.items() if values is not ANY} | family.takes
    theta = float(rope.get("rope_theta", config.get("rope_theta", 10000.0)))
    c = GPTConfig(**known | {"mlp": mlps[0], "rope_theta": theta, "tied": tied} | found)
    c.validate()
    return family, c


def read_tokenizer(path: Path, config: dict) -> tuple[Tokenizer, list[int], int, int]:
    """
    tokenizer.json -> our tokenizer, their ids in the order of ours, and those that begin and end a text.
    It must be byte-level BPE with GPT-2's split into words, since that is what tokenizer.py knows.
    """
    data = json.loads(path.read_text(encoding="utf-8"))
    byte = {char: b for b, char in tokenizers.byte_chars().items()}

    def spelt(text: str) -> bytes:
        return bytes(byte[char] for char in text)

    def other(why: str):
        raise ValueError(f"{path} {why}, for which tokenizer.py has no equivalent")

    bpe, split, added = data["model"], data["pre_tokenizer"] or {}, data["added_tokens"]
    if split.get("type") == "Sequence" and len(split["pretokenizers"]) == 1:
        split = split["pretokenizers"][0]
    affixes = bpe.get("continuing_subword_prefix") or bpe.get("end_of_word_suffix")
    special = {token["content"]: token["id"] for token in added if token["special"]}
    if bpe.get("type", "BPE") != "BPE" or bpe.get("byte_fallback") or "ByteLevel" not in json.dumps(split):
        other("is no byte-level BPE")
    if split["type"] != "ByteLevel" or not split.get("use_regex", True) or split.get("add_prefix_space"):
        other("splits text into words in another way than GPT-2")
    if data["normalizer"] or len(special) < len(added) or affixes:
        other("changes texts, or has tokens beside its BPE that are no special ones")
    ids = {spelt(text): i for text, i in bpe["vocab"].items() if text not in special}
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in bpe["merges"]]
    pairs = [[spelt(part) for part in merge] for merge in merges]
    single = sorted((token for token in ids if len(token) == 1), key=ids.get)
    tokens = single + [b"".join(pair) for pair in pairs]
    ranks = {token: rank for rank, token in enumerate(tokens)}
    if len(single) != 256 or ranks.keys() != ids.keys() or len(ranks) != len(tokens):
        other("lacks some bytes, or has tokens that no merge makes, or two merges that make one")
    if [tokenizers.last_pair(token, ranks) for token in tokens[256:]] != pairs:
        other("merges in an order that its tokens do not show")

    end = config.get("eos_token_id")
    end = end[0] if isinstance(end, list) else end
    if end not in special.values():
        raise ValueError(f"eos_token_id={end} in config.json is none of the special tokens in {path}")
    begin = config.get("bos_token_id")
    begin = begin if begin in special.values() else end
    if left_out := sorted(token for token, i in special.items() if i not in (begin, end)):
        warnings.warn(f"special tokens left out: {', '.join(left_out)}", stacklevel=3)
    tokenizer = Tokenizer(
        "byte" if tokens == [bytes([b]) for b in range(256)] else f"bpe{len(tokens) + 1}", tokens
    )
    if tokenizer.sha256 == GPT2_SHA256:
        tokenizer = Tokenizer("gpt2", tokens)
    return tokenizer, [ids[token] for token in tokens], begin, end


# ----------------------------------------------------------------------------------------------------------
# llama2.c: the model file that run.c reads, and its tokenizer.bin


def to_llama2c(model: GPT, tokenizer: Tokenizer, path: str | Path) -> Path:
    """
    Write the model file, and tokenizer.bin beside it, whose path is returned. Ids are permuted: to run.c, 1
    begins and ends a text, 3 + b is byte b, and 0 and 2 mean nothing, so the two last tokens go there.

    run.c puts a space before a prompt, and does not split it into words: one in some thousand sentences of
    TinyStories becomes other tokens than here, as 'spell' in quotes, where it sees no 's at the beginning.
    """
    path, eot = Path(path), tokenizer.eot
    refuse(misfits(model.config, RUN_C), "llama2.c's run.c")
    model = plain(model, norm_weight=True)
    c, blocks = model.config, model.core.blocks
    single = [tokenizer.tokens.index(bytes([b])) for b in range(256)]
    *rest, zero, two = single + sorted(set(range(eot)) - set(single))
    order = [zero, eot, two, *rest]  # our ids in the order of theirs
    heads = [block.attn.qkv.weight.split((c.n_embd, *2 * [c.kv_heads * c.head_dim])) for block in blocks]
    gates = [block.mlp.fc.weight.split(c.hidden) for block in blocks]
    tensors = [
        model.embedder.tokens.weight[order],
        *(block.norm1.weight for block in blocks),
        *(neighbours(q, c.head_dim) for q, k, v in heads),
        *(neighbours(k, c.head_dim) for q, k, v in heads),
        *(v for q, k, v in heads),
        *(block.attn.proj.weight for block in blocks),
        *(block.norm2.weight for block in blocks),
        *(gate for gate, up in gates),
        *(block.mlp.proj.weight for block in blocks),
        *(up for gate, up in gates),
        model.head.norm.weight,
        *rope_table(torch.arange(c.block_size), c.head_dim, c.rope_theta),  # run.c skips these two
        *([] if c.tied else [model.head.linear.weight[order]]),
    ]
    V = c.vocab_size if c.tied else -c.vocab_size
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        file.write(struct.pack("<7i", c.n_embd, c.hidden, c.n_layer, c.n_head, c.kv_heads, V, c.block_size))
        for tensor in tensors:
            file.write(tensor.detach().numpy().astype("<f4").tobytes())
    with open(path.with_name("tokenizer.bin"), "wb") as file:
        file.write(struct.pack("<i", max(map(len, tokenizer.tokens))))
        for i in order:  # the pair with the highest score merges; one of -1e30 never does
            score, token = -1e30 if i == eot else -i, tokenizer.tokens[i]
            file.write(struct.pack("<fi", score, len(token)) + token)
    return path.with_name("tokenizer.bin")


# ----------------------------------------------------------------------------------------------------------
# The command line


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line's settings. ValueError where it is wrong."""

    def wrong(message: str):
        raise ValueError(message)

    parser = argparse.ArgumentParser(
        prog="export.py", allow_abbrev=False, description="Write a trained model in another program's format."
    )
    parser.error = wrong
    add = parser.add_argument
    add("--to", choices=["hf", "llama2c"], required=True,
        help="hf: a folder for transformers; llama2c: a file for run.c")  # fmt: skip
    add("dest", metavar="DEST", help="the folder, or the model file")
    add("--out_dir", help="a run's folder, or a checkpoint; without it, the newest run in out/")
    add("--overwrite", action="store_true", help="write over an earlier export")
    return parser.parse_args(arguments)


def run(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    dest = Path(options.dest)
    files = [dest / "config.json"] if options.to == "hf" else [dest, dest.with_name("tokenizer.bin")]
    there = [str(file) for file in files if file.exists()]
    if there and not options.overwrite:
        raise ValueError(f"{there[0]} is there already; --overwrite writes over it")
    source = checkpoint.find(options.out_dir or checkpoint.newest_run())
    model, tokenizer = checkpoint.load(source)
    print(f"{source}: {model.config.estimate()['parameters'] / 1e6:.1f}M parameters, {tokenizer.name}")
    if options.to == "hf":
        print(f"{dest}: {to_hf(model, tokenizer, dest)}, for AutoModelForCausalLM and AutoTokenizer")
    else:
        beside = to_llama2c(model, tokenizer, dest)
        print(f'{dest}, {beside}: ./run {dest} -z {beside} -t 0 -i "Once upon a time"')


def main(arguments: list[str] | None = None) -> int:
    """run(), and the exit status: 0; 1 the machine failed; 2 what was given is wrong; 130 after Ctrl-C."""
    try:
        run(arguments)
        return 0
    except KeyboardInterrupt:
        return 130
    except (ValueError, FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError) as error:
        status, reason = 2, error
    except (OSError, RuntimeError, MemoryError) as error:
        status, reason = 1, error
    print(f"export.py: {' '.join(str(reason).split()) or type(reason).__name__}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
