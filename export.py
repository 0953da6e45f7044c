"""
Our models in the formats of other programs, and theirs in ours.

    python export.py --to hf out/tiny-hf          # a folder for transformers: AutoModelForCausalLM, AutoTokenizer
    python export.py --to llama2c out/tiny.bin    # for llama2.c's run.c; tokenizer.bin is put beside it
    python train.py config/finetune.py --init_from=hf:out/tiny-hf      # the way back, also from a Hub id: gpt2

An export computes the same logits and splits text into the same tokens, or it is refused with the name of the
setting that has no equivalent there. Shared layers are written out, LoRA is merged, the vocabulary's padding is
left out. `from_hf` reads everything that `to_hf` writes, and what others made for these model classes.
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

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import checkpoint
import tokenizer as tokenizers
from model import GATES, GPT, MLPS, GPTConfig, LoRA, rope_table, sinusoids
from tokenizer import EOT, Tokenizer, Unreachable

# ----------------------------------------------------------------------------------------------------------
# The model classes of transformers that ours are equal to


class Family(NamedTuple):
    """A class of transformers, as tables. What its config.json says of the activation and RoPE is in the code."""

    name: str
    kind: str  # model_type in config.json
    knows: dict  # our settings -> the values that it has an equivalent for; None = any
    takes: dict  # settings that make an equal model of ours with all the weights that its files hold
    keys: dict  # its config.json -> our settings
    fixed: dict  # its config.json -> the one value that we know
    outer: dict  # our module -> its module
    blocks: str  # its list of blocks
    inner: dict  # our module in a block -> its module, or several in the order of our rows


COMMON = dict(causal=[True], embed_norm=[False], softcap=[0], window=[0], qk_norm=[False])
PLAIN = tuple(mlp for mlp in MLPS if mlp not in GATES)
ROTARY = COMMON | dict(norm=["rmsnorm"], position=["rope"], mlp=GATES)

KEYS = {
    "hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head",
    "num_key_value_heads": "n_kv_head", "intermediate_size": "mlp_hidden", "rms_norm_eps": "norm_eps",
    "max_position_embeddings": "block_size", "vocab_size": "vocab_size", "tie_word_embeddings": "tied",
}  # fmt: skip
BIASES = {"attention_bias": "bias", "mlp_bias": "bias"}
WINDOW = {"sliding_window": "window"}
GPT2_KEYS = {
    "n_embd": "n_embd", "n_layer": "n_layer", "n_head": "n_head", "n_inner": "mlp_hidden",
    "layer_norm_epsilon": "norm_eps", "n_positions": "block_size", "vocab_size": "vocab_size",
    "tie_word_embeddings": "tied",
}  # fmt: skip
OPTIONAL = {"n_kv_head", "mlp_hidden", "window", "softcap", "tied", "bias"}  # may be missing or null there
GPT2_FIXED = dict(scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False)

OUTER = {"embedder.tokens": "model.embed_tokens", "head.norm": "model.norm", "head.linear": "lm_head"}
GPT2_OUTER = {"embedder.tokens": "transformer.wte", "embedder.positions": "transformer.wpe",
              "head.norm": "transformer.ln_f", "head.linear": "lm_head"}  # fmt: skip
ATTENTION = {"attn.qkv": "self_attn.q_proj self_attn.k_proj self_attn.v_proj", "attn.proj": "self_attn.o_proj",
             "attn.q_norm": "self_attn.q_norm", "attn.k_norm": "self_attn.k_norm"}  # fmt: skip
GATED = {"norm1": "input_layernorm", "norm2": "post_attention_layernorm",
         "mlp.fc": "mlp.gate_proj mlp.up_proj", "mlp.proj": "mlp.down_proj"} | ATTENTION  # fmt: skip
UNGATED = GATED | {"mlp.fc": "mlp.up_proj"}
APERTUS = UNGATED | {"norm1": "attention_layernorm", "norm2": "feedforward_layernorm"}
NANOCHAT = ATTENTION | {"mlp.fc": "mlp.fc1", "mlp.proj": "mlp.fc2"}
GPT2 = {"norm1": "ln_1", "attn.qkv": "attn.c_attn", "attn.proj": "attn.c_proj",
        "norm2": "ln_2", "mlp.fc": "mlp.c_fc", "mlp.proj": "mlp.c_proj"}  # fmt: skip

FAMILIES = [
    Family("LlamaForCausalLM", "llama", ROTARY,
           dict(norm_weight=True), KEYS | BIASES, {}, OUTER, "model.layers", GATED),
    Family("MistralForCausalLM", "mistral", ROTARY | dict(bias=[False], window=None),
           dict(norm_weight=True), KEYS | WINDOW, {}, OUTER, "model.layers", GATED),
    Family("Qwen3ForCausalLM", "qwen3", ROTARY | dict(bias=[False], window=None, qk_norm=[True]),
           dict(norm_weight=True), KEYS | WINDOW, dict(attention_bias=False, max_window_layers=0),
           OUTER, "model.layers", GATED),
    Family("ArceeForCausalLM", "arcee", ROTARY | dict(mlp=PLAIN),
           dict(norm_weight=True), KEYS | BIASES, {}, OUTER, "model.layers", UNGATED),
    Family("NanoChatForCausalLM", "nanochat",
           ROTARY | dict(mlp=PLAIN, bias=[False], qk_norm=[True], norm_weight=[False], embed_norm=[True], softcap=None),
           {}, KEYS | {"final_logit_softcapping": "softcap"}, dict(attention_bias=False),
           OUTER, "model.layers", NANOCHAT),
    Family("ApertusForCausalLM", "apertus", ROTARY | dict(mlp=PLAIN, bias=[False], qk_norm=[True]),
           dict(norm_weight=True), KEYS, dict(attention_bias=False), OUTER, "model.layers", APERTUS),
    Family("GPT2LMHeadModel", "gpt2",
           COMMON | dict(norm=["layernorm"], position=["learned", "sinusoidal", "none"], mlp=PLAIN, n_kv_head=[0]),
           dict(norm_weight=True, bias=True, position="learned"), GPT2_KEYS, GPT2_FIXED,
           GPT2_OUTER, "transformer.h", GPT2),
]  # fmt: skip

# what transformers calls our activations; of several names the first is written, all are read
ACTIVATIONS = {"swiglu": ["silu", "swish"], "geglu": ["gelu"], "gelu": ["gelu"], "relu": ["relu"], "tanh": ["tanh"],
               "gelu_tanh": ["gelu_new", "gelu_pytorch_tanh", "gelu_fast"], "relu2": ["relu2"],
               "silu": ["silu", "swish"], "leaky_relu": ["leaky_relu"]}  # fmt: skip

ROPE = {"rope_type": "default", "type": "default", "partial_rotary_factor": 1}  # what we know of its variants
GPT2_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"  # of GPT-2's vocabulary

# what llama2.c's run.c computes
RUN_C = ROTARY | dict(mlp=["swiglu"], bias=[False], norm_eps=[1e-5], rope_theta=[10000])


def misfits(c: GPTConfig, knows: dict) -> list[str]:
    """The settings, as name=value, that have no equivalent in something that knows these values."""
    c = replace(c, n_kv_head=c.n_kv_head % c.n_head, window=c.window % max(c.block_size, c.window))
    return [f"{name}={value}" for name, values in knows.items()
            if values and (value := getattr(c, name)) not in values]  # fmt: skip


def refuse(found: list[str], where: str) -> None:
    if found:
        raise ValueError(f"{', '.join(found)} {'have' if found[1:] else 'has'} no equivalent in {where}")


# ----------------------------------------------------------------------------------------------------------
# Weights


def plain(model: GPT, **settings) -> GPT:
    """
    An equal model whose layers share nothing, with other settings that leave it equal: norm weights of 1, biases
    of 0, and sinusoidal positions or none as learned ones are what it gets where it had nothing.
    """
    c, state = model.config, model.state_dict()
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, LoRA):
            merged = {f"{name}.{leaf}": value.detach() for leaf, value in module.base.named_parameters()}
            merged[f"{name}.weight"] = merged[f"{name}.weight"] + module.up.weight.detach() @ module.down.weight.detach()
            state = {key: value for key, value in state.items() if not key.startswith(f"{name}.")} | merged
    result = GPT(replace(c, share="none", n_kv_head=c.kv_heads, mlp_hidden=c.hidden, **settings))
    if c.position != result.config.position:  # to learned positions
        table = sinusoids(torch.arange(c.block_size), c.n_embd, c.rope_theta)
        state["embedder.positions.weight"] = table * (c.position == "sinusoidal")
    missing, unknown = result.load_state_dict(state, strict=False)
    if unknown or any(not re.search(r"bias$|norm\d?\.weight$", name) for name in missing):
        raise ValueError(f"only models of model.py's own parts can be exported, not {(unknown + missing)[0]}")
    return result.eval()


def views(model: GPT, family: Family) -> Iterator[tuple[str, Tensor]]:
    """
    The name of each tensor in a family's files, and its place in a model of ours that has all of them: to read
    it is an export, to write to it an import. Vocabulary-sized ones without their padding.
    """
    c = model.config
    table = dict(family.outer)
    if c.tied:
        del table["head.linear"]
    for i in range(c.n_layer):
        for ours, theirs in family.inner.items():
            table[f"core.blocks.{i}.{ours}"] = " ".join(f"{family.blocks}.{i}.{name}" for name in theirs.split())
    for ours, theirs in table.items():
        module, names = model.get_submodule(ours), theirs.split()
        sizes = {1: None, 2: 2 * [c.hidden], 3: [c.n_embd, *2 * [c.kv_heads * c.head_dim]]}[len(names)]
        conv1d = family.kind == "gpt2" and isinstance(module, nn.Linear) and ours != "head.linear"
        for leaf, value in module.named_parameters(recurse=False):
            value = value.detach()[: c.vocab_size if ours in ("embedder.tokens", "head.linear") else None]
            for name, rows in zip(names, value.split(sizes or len(value)), strict=True):
                yield f"{name}.{leaf}", rows.t() if conv1d else rows


def swap_halves(name: str, x: Tensor, c: GPTConfig) -> Tensor:
    """Rows of nanochat's queries and keys: it turns RoPE's pairs the other way round, so their halves swap places."""
    if re.search(r"\.[qk]_proj\.", name):
        return x.unflatten(0, (-1, 2, c.head_dim // 2)).flip(1).flatten(0, 2)
    return x


def neighbours(x: Tensor, c: GPTConfig) -> Tensor:
    """Rows of queries and keys for a RoPE that pairs 2i and 2i + 1, as Llama's authors and run.c do, not i and i + d/2."""
    return x.unflatten(0, (-1, 2, c.head_dim // 2)).transpose(1, 2).flatten(0, 2)


# ----------------------------------------------------------------------------------------------------------
# Hugging Face: to a folder


def to_hf(model: GPT, tokenizer: Tokenizer, folder: str | Path) -> str:
    """Write the folder and return the name of the class that opens it. ValueError where there is no equal one."""
    folder, eot = Path(folder), tokenizer.eot
    family = min(FAMILIES, key=lambda family: len(misfits(model.config, family.knows)))
    refuse(misfits(model.config, family.knows), f"{family.name}, the nearest model of transformers")
    model = plain(model, **family.takes)
    c, tensors = model.config, {}
    for name, view in views(model, family):
        view = swap_halves(name, view, c) if family.kind == "nanochat" else view
        tensors[name] = view.clone(memory_format=torch.contiguous_format)
    activation = "activation_function" if family.kind == "gpt2" else "hidden_act"
    config = {"architectures": [family.name], "model_type": family.kind, "dtype": str(tensors[name].dtype)[6:],
              "bos_token_id": eot, "eos_token_id": eot, "pad_token_id": None, activation: ACTIVATIONS[c.mlp][0],
              **{theirs: getattr(c, ours) for theirs, ours in family.keys.items()}, **family.fixed}  # fmt: skip
    if c.position == "rope":
        rope = {"rope_type": "default", "rope_theta": c.rope_theta}
        config |= {"rope_parameters": rope, "rope_theta": c.rope_theta, "head_dim": c.head_dim}
    if "sliding_window" in config:
        config |= {"sliding_window": c.window or None, "use_sliding_window": bool(c.window)}
    config["final_logit_softcapping"] = c.softcap or None

    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(folder / "tokenizer.json")
    first, text = {"SpecialToken": {"id": EOT, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    second = [{kind: value | {"type_id": 1} for kind, value in part.items()} for part in (first, text)]
    second[1]["Sequence"]["id"] = "B"
    splits = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    splits["post_processor"] = {"type": "TemplateProcessing", "single": [first, text], "pair": [first, text, *second],
                                "special_tokens": {EOT: {"id": EOT, "ids": [eot], "tokens": [EOT]}}}  # fmt: skip
    files = {
        "tokenizer.json": splits,
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": EOT, "eos_token": EOT,
            "model_max_length": c.block_size, "clean_up_tokenization_spaces": False,
            "split_special_tokens": True,  # a text never turns into end-of-text
        },
        "generation_config.json": {"bos_token_id": eot, "eos_token_id": eot, "pad_token_id": eot},
        "config.json": config,
    }  # fmt: skip
    for name, data in files.items():
        (folder / name).write_text(json.dumps(data, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return family.name


# ----------------------------------------------------------------------------------------------------------
# Hugging Face: from a folder, or from the Hub


def from_hf(source: str | Path) -> tuple[GPT, Tokenizer]:
    """
    A folder with config.json, tokenizer.json and model.safetensors, or a Hub id -> (model in eval mode, tokenizer).
    Our ids are not theirs where end-of-text is not their last id. Other special tokens than end-of-text are left
    out; one that only begins a text becomes what end-of-text is as an input. ValueError for what has no equivalent
    here, FileNotFoundError for a file that is not there, Unreachable where the Hub is.
    """
    folder = download(source)
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        index = folder / "model.safetensors.index.json"
        shards = json.loads(index.read_text())["weight_map"].values() if index.exists() else ["model.safetensors"]
        tokenizer, rows, begin, end = read_tokenizer(folder / "tokenizer.json", config)
        tensors = {name: x for shard in sorted(set(shards)) for name, x in load_file(folder / shard).items()}
        family, c = read_config(config, "lm_head.weight" not in tensors)
    except FileNotFoundError as error:
        missing = Path(error.filename or "model.safetensors").name
        raise FileNotFoundError(f"{source} has no {missing}") from None
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError, SafetensorError) as error:
        raise ValueError(f"{source} is no folder of transformers, or damaged: {error!r}") from None
    prefix = family.blocks.split(".")[0] + "."  # which the files of gpt2 itself are without
    tensors = {n if n.startswith((prefix, "lm_head.")) else prefix + n: x for n, x in tensors.items()}
    tokens, head = family.outer["embedder.tokens"] + ".weight", "lm_head.weight"
    if c.tied:
        tensors[head] = tensors.get(tokens)
    model = GPT(replace(c, vocab_size=tokenizer.vocab_size, tied=c.tied and begin == end)).eval()
    for name, view in views(model, family):
        value = tensors.pop(name, torch.empty(0))
        if name in (tokens, head) and len(value) > max(*rows, begin, end):
            value = value[[*rows, begin if name == tokens else end]]
        if value.shape != view.shape:
            raise ValueError(f"{source}: {name} should be {list(view.shape)}, but is {list(value.shape)}")
        view.copy_(swap_halves(name, value, c) if family.kind == "nanochat" else value)
    unknown = [n for n in tensors if n != head and not re.search(r"attn\.(masked_)?bias$|inv_freq$", n)]
    if unknown:
        raise ValueError(f"{source}: {family.name} has no place for {unknown[0]}")
    return model, tokenizer


def download(source: str | Path) -> Path:
    """The folder that this path or Hub id stands for."""
    if Path(source).is_dir():
        return Path(source)
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", str(source)):
        raise FileNotFoundError(f"there is no folder {source}")
    from huggingface_hub import HfApi, constants, errors, snapshot_download

    try:
        if not constants.HF_HUB_OFFLINE:
            tokenizers.within(4, lambda: HfApi().model_info(str(source), timeout=3))
        wanted = ["config.json", "tokenizer.json", "*.safetensors", "*.safetensors.index.json"]
        return Path(snapshot_download(str(source), allow_patterns=wanted, ignore_patterns=["*/*"]))
    except errors.RepositoryNotFoundError:
        raise ValueError(f"{source} is neither a folder here nor a model of the Hub that is open to you") from None
    except Exception as error:
        raise Unreachable(f"{source} is no folder here, and the Hugging Face Hub cannot be reached "
                          f"({type(error).__name__}): give a folder with the model's files") from None  # fmt: skip


def read_config(config: dict, tied: bool) -> tuple[Family, GPTConfig]:
    """config.json -> its family and our settings, vocab_size still theirs. `tied`: what holds if it does not say."""
    family = next((family for family in FAMILIES if family.kind == config["model_type"]), None)
    if family is None:
        refuse([f"model_type={config['model_type']}"], f"model.py: there are {', '.join(f.kind for f in FAMILIES)}")
    if not config.get("use_sliding_window", True):
        config = config | {"sliding_window": None}
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    fixed = family.fixed | {"head_dim": config.get("hidden_size", 0) // config.get("num_attention_heads", 1)}
    odd = {key: config[key] for key, value in fixed.items() if config.get(key) not in (value, None)}
    odd |= {key: rope[key] for key, value in ROPE.items() if rope.get(key, value) != value}
    c = {}
    for theirs, ours in family.keys.items():
        value = config.get(theirs)
        if value is None and ours not in OPTIONAL:
            raise KeyError(theirs)
        if value is not None and c.setdefault(ours, value) != value:
            odd[theirs] = value  # the other of two settings that are one here
    activation = config["activation_function" if family.kind == "gpt2" else "hidden_act"]
    mlps = [mlp for mlp in family.knows["mlp"] if activation in ACTIVATIONS[mlp]]
    if not mlps:
        odd["hidden_act"] = activation
    refuse([f"{key}={value}" for key, value in odd.items()], "model.py")
    known = {name: values[0] for name, values in family.knows.items() if values}
    theta = float(rope.get("rope_theta", config.get("rope_theta", 10000.0)))
    c = GPTConfig(**known | family.takes | {"tied": tied, "mlp": mlps[0], "rope_theta": theta} | c)
    c.validate()
    return family, c


def read_tokenizer(path: Path, config: dict) -> tuple[Tokenizer, list[int], int, int]:
    """
    tokenizer.json -> our tokenizer, their ids in the order of ours, and those that begin and end a text. It must
    be byte-level BPE that splits text into words as GPT-2 does.
    """
    data = json.loads(path.read_text(encoding="utf-8"))
    special = {token["content"]: token["id"] for token in data["added_tokens"] if token["special"]}
    model, split = data["model"], data["pre_tokenizer"] or {}
    if split.get("type") == "Sequence" and len(split["pretokenizers"]) == 1:
        split = split["pretokenizers"][0]
    if model.get("type", "BPE") != "BPE" or model.get("byte_fallback") or "merges" not in model:
        raise ValueError(f"{path} is no byte-level BPE but {model.get('type')}")
    splits_like_gpt2 = split.get("type") == "ByteLevel" and split.get("use_regex", True)
    if not splits_like_gpt2 or split.get("add_prefix_space") or data["normalizer"]:
        raise ValueError(f"{path} does not split text into words as GPT-2 does, and tokenizer.py knows no other way")
    if len(special) < len(data["added_tokens"]) or model.get("continuing_subword_prefix"):
        raise ValueError(f"{path} has tokens that stand outside of its BPE, for which there is no equivalent here")
    byte = {char: bytes([b]) for b, char in tokenizers.byte_chars().items()}
    ids = {b"".join(byte[char] for char in spelt): i for spelt, i in model["vocab"].items() if spelt not in special}
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    pairs = [[b"".join(byte[char] for char in part) for part in merge] for merge in merges]
    tokens = sorted((token for token in ids if len(token) == 1), key=ids.get) + [b"".join(pair) for pair in pairs]
    ranks = {token: rank for rank, token in enumerate(tokens)}
    if len(tokens) - len(pairs) != 256 or ranks.keys() != ids.keys():
        raise ValueError(f"{path} lacks some bytes, or has tokens that no merge makes")
    if any(tokenizers.merge_pair(token, ranks) != pair for token, pair in zip(tokens[256:], pairs, strict=True)):
        raise ValueError(f"{path} merges in another order than that of its ranks")
    ends = config.get("eos_token_id")
    end = ends[0] if isinstance(ends, list) else ends
    if end not in special.values():
        raise ValueError(f"eos_token_id={end} in config.json is none of the special tokens in {path}")
    begin = config.get("bos_token_id")
    begin = begin if begin in special.values() else end
    if left_out := sorted(token for token, i in special.items() if i not in (begin, end)):
        warnings.warn(f"special tokens left out: {', '.join(left_out)}", stacklevel=3)
    tokenizer = Tokenizer(f"bpe{len(tokens) + 1}", tokens)
    if not pairs and tokens == [bytes([b]) for b in range(256)]:
        tokenizer = Tokenizer("byte", tokens)
    if tokenizer.sha256 == GPT2_SHA256:
        tokenizer = Tokenizer("gpt2", tokens)
    return tokenizer, [ids[token] for token in tokens], begin, end


# ----------------------------------------------------------------------------------------------------------
# llama2.c: the model file that run.c reads, and its tokenizer.bin


def to_llama2c(model: GPT, tokenizer: Tokenizer, path: str | Path) -> Path:
    """
    Write the model file, and tokenizer.bin beside it, whose path is returned. Ids are permuted: run.c begins and
    ends a text with id 1 and takes id 3 + b for byte b. Ids 0 and 2 mean nothing to it: the two last tokens go there.

    run.c knows no words: it merges across the borders that tokenizer.py would respect. In text like that of the
    stories this changes nothing; a prompt with two spaces in a row, say, may become other tokens.
    """
    path = Path(path)
    refuse(misfits(model.config, RUN_C), "llama2.c's run.c")
    model = plain(model, norm_weight=True)
    c, vocab, eot = model.config, tokenizer.tokens, tokenizer.eot
    *rest, zero, two = sorted(range(eot), key=lambda i: (len(vocab[i]) > 1, vocab[i] if len(vocab[i]) == 1 else b"", i))
    ids = [zero, eot, two, *rest]  # ours, in its order
    blocks = model.core.blocks
    qkv = [block.attn.qkv.weight.split((c.n_embd, *2 * [c.kv_heads * c.head_dim])) for block in blocks]
    fc = [block.mlp.fc.weight.split(c.hidden) for block in blocks]
    cos, sin = rope_table(torch.arange(c.block_size), c.head_dim, c.rope_theta)
    tensors = [
        model.embedder.tokens.weight[ids],
        *(block.norm1.weight for block in blocks),
        *(neighbours(q, c) for q, k, v in qkv),
        *(neighbours(k, c) for q, k, v in qkv),
        *(v for q, k, v in qkv),
        *(block.attn.proj.weight for block in blocks),
        *(block.norm2.weight for block in blocks),
        *(gate for gate, up in fc),
        *(block.mlp.proj.weight for block in blocks),
        *(up for gate, up in fc),
        model.head.norm.weight,
        *(cos, sin),  # not read any more, but their place is kept
        *([] if c.tied else [model.head.linear.weight[ids]]),
    ]
    with open(path, "wb") as file:
        file.write(struct.pack("<7i", c.n_embd, c.hidden, c.n_layer, c.n_head, c.kv_heads,
                               c.vocab_size if c.tied else -c.vocab_size, c.block_size))  # fmt: skip
        for tensor in tensors:
            file.write(tensor.detach().numpy().astype("<f4").tobytes())
    with open(path.with_name("tokenizer.bin"), "wb") as file:
        file.write(struct.pack("<i", max(map(len, vocab))))
        for i in ids:  # of two neighbours those merge whose token has the highest score; end-of-text never comes of it
            file.write(struct.pack("<fi", -i if i != eot else -1e30, len(vocab[i])) + vocab[i])
    return path.with_name("tokenizer.bin")


# ----------------------------------------------------------------------------------------------------------
# The command line


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line's settings. ValueError where it is wrong."""

    def wrong(message: str):
        raise ValueError(message)

    parser = argparse.ArgumentParser(prog="export.py", allow_abbrev=False,
                                     description="A trained model in another program's format.")  # fmt: skip
    parser.error = wrong
    parser.add_argument("--to", choices=["hf", "llama2c"], required=True,
                        help="hf: a folder for transformers; llama2c: a model file for run.c")  # fmt: skip
    parser.add_argument("dest", metavar="DEST", help="the folder, or the model file")
    parser.add_argument("--out_dir", help="a run's folder, or one checkpoint; without it, the newest run in out/")
    parser.add_argument("--overwrite", action="store_true", help="write over an earlier export")
    return parser.parse_args(arguments)


def run(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    source, dest = checkpoint.find(options.out_dir or checkpoint.newest_run()), Path(options.dest)
    model, tokenizer = checkpoint.load(source)
    size = f"{source}: {model.num_params()['total'] / 1e6:.1f}M parameters, {tokenizer.name}"
    new = [dest / "config.json"] if options.to == "hf" else [dest, dest.with_name("tokenizer.bin")]
    for file in new:
        if file.exists() and not options.overwrite:
            raise ValueError(f"{file} is there already; --overwrite writes over it")
    if options.to == "hf":
        print(f"{size}\n{dest}: {to_hf(model, tokenizer, dest)}; AutoModelForCausalLM and AutoTokenizer open it")
    else:
        beside = to_llama2c(model, tokenizer, dest)
        print(f'{size}\n{dest} and {beside}: ./run {dest} -z {beside} -t 0 -i "Once upon a time"')


def main(arguments: list[str] | None = None) -> int:
    """run(), and the exit status: 0, or 1 the machine failed, 2 a mistake in what was given, 130 after Ctrl-C."""
    try:
        run(arguments)
        return 0
    except KeyboardInterrupt:
        return 130
    except (ValueError, FileNotFoundError) as error:
        status, reason = 2, error
    except (OSError, RuntimeError, MemoryError) as error:
        status, reason = 1, error
    print(f"export.py: {' '.join(str(reason).split()) or type(reason).__name__}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
