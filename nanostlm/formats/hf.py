"""
Hugging Face folders: config.json, model.safetensors and the tokenizer's files, written and read.

    hf.to_hf(model, tokenizer, "out/tiny-hf")     # for AutoModelForCausalLM and AutoTokenizer, no remote code
    model, tokenizer = hf.from_hf("out/tiny-hf")  # or a Hub id such as gpt2

`from_hf` reads what `to_hf` writes, and other models of the same classes of transformers.
"""

import json
import re
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import safetensors.torch
import torch
from torch import Tensor, nn

from model import GPT, GPTConfig
from nanostlm import machine, settings
from nanostlm import tokenizer as tokenizers
from nanostlm.formats import ANY, COMMON, LLAMA, UNGATED, plain, refuse, unsupported
from nanostlm.schema import COUNT, FLAG, NAME, NUMBER, TEXT, TYPES, WHOLE, check, naming, read_json
from nanostlm.tokenizer import EOT, Tokenizer, Unreachable

# ----------------------------------------------------------------------------------------------------------
# Names: their key in config.json -> our setting

KEYS = {
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "num_key_value_heads": "n_kv_head",
    "intermediate_size": "mlp_hidden",
    "vocab_size": "vocab_size",
    "rms_norm_eps": "norm_eps",
    "max_position_embeddings": "block_size",
    "tie_word_embeddings": "tied",
}
BIAS_KEYS = {"attention_bias": "bias", "mlp_bias": "bias"}
WINDOW_KEYS = {"sliding_window": "window"}
GPT2_KEYS = {
    "n_embd": "n_embd",
    "n_layer": "n_layer",
    "n_head": "n_head",
    "n_inner": "mlp_hidden",
    "vocab_size": "vocab_size",
    "layer_norm_epsilon": "norm_eps",
    "n_positions": "block_size",
    "tie_word_embeddings": "tied",
}
OPTIONAL = ("n_kv_head", "mlp_hidden", "window", "softcap", "tied", "bias")  # may be missing or null

# Our module -> their module. Several names mean that our weight is the concatenation of their rows.

OUTER = {"embedder.tokens": "model.embed_tokens", "head.norm": "model.norm", "head.linear": "lm_head"}
BLOCK = {
    "norm1": "input_layernorm",
    "norm2": "post_attention_layernorm",
    "attn.qkv": "self_attn.q_proj self_attn.k_proj self_attn.v_proj",
    "attn.proj": "self_attn.o_proj",
    "attn.q_norm": "self_attn.q_norm",
    "attn.k_norm": "self_attn.k_norm",
    "mlp.fc": "mlp.gate_proj mlp.up_proj",
    "mlp.proj": "mlp.down_proj",
}
UNGATED_BLOCK = BLOCK | {"mlp.fc": "mlp.up_proj"}
GPT2_OUTER = {
    "embedder.tokens": "transformer.wte",
    "embedder.positions": "transformer.wpe",
    "head.norm": "transformer.ln_f",
    "head.linear": "lm_head",
}
GPT2_BLOCK = {
    "norm1": "ln_1",
    "attn.qkv": "attn.c_attn",
    "attn.proj": "attn.c_proj",
    "norm2": "ln_2",
    "mlp.fc": "mlp.c_fc",
    "mlp.proj": "mlp.c_proj",
}

ACTIVATIONS = {  # our mlp -> their names of its activation: the first is written, all are read
    "swiglu": ["silu", "swish"],
    "geglu": ["gelu"],
    "gelu": ["gelu"],
    "relu": ["relu"],
    "gelu_tanh": ["gelu_new", "gelu_pytorch_tanh", "gelu_fast"],
    "silu": ["silu", "swish"],
    "relu2": ["relu2"],
    "tanh": ["tanh"],
    "leaky_relu": ["leaky_relu"],
}
ROPE = {"rope_type": "default", "type": "default", "partial_rotary_factor": 1}  # the supported kind of RoPE
GPT2_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"  # of GPT-2's vocabulary
FILES = ("config.json", "tokenizer.json", "*.safetensors", "*.safetensors.index.json")  # read from the Hub

THETA = {"rope_theta?": NUMBER}
CONFIG = {"model_type": TEXT, "rope_scaling?": THETA, "rope_parameters?": THETA, **THETA}
TOKENIZER = {
    "model": {"vocab": {"*": WHOLE}, "merges": []},
    "pre_tokenizer?": {"type": TEXT, "pretokenizers?": [{"type": TEXT}]},
    "added_tokens": [{"content": TEXT, "id": WHOLE, "special": FLAG}],
}
NO_BIAS = dict(attention_bias=False, mlp_bias=False)
QWEN3_DEFAULTS = dict(num_key_value_heads=32, head_dim=128, use_sliding_window=False, sliding_window=4096)
QWEN3_DEFAULTS |= dict(max_window_layers=28, layer_types=None)


class Family(NamedTuple):
    """A class of transformers with an equivalent configuration of ours."""

    name: str
    model_type: str  # in config.json
    supported: dict  # our setting -> the values that have an equivalent there
    keys: dict = KEYS
    fixed: dict = {}  # key in config.json -> the only supported value
    block: dict = BLOCK
    blocks: str = "model.layers"  # their name of the list of blocks
    outer: dict = OUTER  # modules that are not in a block
    explicit: dict = dict(
        norm_weight=True
    )  # our settings for a model with a parameter for each of their tensors
    defaults: dict = {}  # keys that may be missing in config.json -> the defaults of transformers


FAMILIES = [
    Family("LlamaForCausalLM", "llama", LLAMA, KEYS | BIAS_KEYS, defaults=NO_BIAS),
    Family(
        "MistralForCausalLM",
        "mistral",
        LLAMA | dict(bias=[False], window=ANY),
        KEYS | WINDOW_KEYS,
        defaults=dict(num_key_value_heads=8, sliding_window=4096),
    ),
    Family(
        "Qwen3ForCausalLM",
        "qwen3",
        LLAMA | dict(bias=[False], window=ANY, qk_norm=[True]),
        KEYS | WINDOW_KEYS,
        fixed=dict(attention_bias=False, max_window_layers=0),
        defaults=QWEN3_DEFAULTS,
    ),
    Family(
        "ArceeForCausalLM",
        "arcee",
        LLAMA | dict(mlp=UNGATED),
        KEYS | BIAS_KEYS,
        block=UNGATED_BLOCK,
        defaults=NO_BIAS,
    ),
    Family(
        "NanoChatForCausalLM",
        "nanochat",
        LLAMA
        | dict(
            mlp=UNGATED, bias=[False], qk_norm=[True], norm_weight=[False], embed_norm=[True], softcap=ANY
        ),
        KEYS | {"final_logit_softcapping": "softcap"},
        fixed=dict(attention_bias=False),
        block=UNGATED_BLOCK | {"mlp.fc": "mlp.fc1", "mlp.proj": "mlp.fc2"},
        explicit={},
        defaults=dict(final_logit_softcapping=15.0),
    ),
    Family(
        "ApertusForCausalLM",
        "apertus",
        LLAMA | dict(mlp=UNGATED, bias=[False], qk_norm=[True]),
        fixed=dict(attention_bias=False),
        block=UNGATED_BLOCK | {"norm1": "attention_layernorm", "norm2": "feedforward_layernorm"},
        defaults=dict(rope_parameters={"rope_type": "llama3"}),
    ),
    Family(
        "GPT2LMHeadModel",
        "gpt2",
        COMMON
        | dict(norm=["layernorm"], position=["learned", "sinusoidal", "none"], mlp=UNGATED, n_kv_head=[0]),
        GPT2_KEYS,
        dict(scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False),
        GPT2_BLOCK,
        "transformer.h",
        GPT2_OUTER,
        explicit=dict(norm_weight=True, bias=True, position="learned"),
    ),
]


def views(model: GPT, family: Family) -> Iterator[tuple[str, Tensor]]:
    """
    Yield the name of each tensor in a family's files, with a view of the parameter of `model` that holds it:
    an export reads the view, an import writes to it. The padding of the vocabulary is outside of the views.
    """
    c, names = model.config, dict(family.outer)
    if c.tied:
        del names["head.linear"]
    for i in range(c.n_layer):
        for ours, theirs in family.block.items():
            full = [f"{family.blocks}.{i}.{name}" for name in theirs.split()]
            names[f"core.blocks.{i}.{ours}"] = " ".join(full)
    kv_dim = c.kv_heads * c.head_dim
    for ours, theirs in names.items():
        module, theirs = model.get_submodule(ours), theirs.split()
        conv1d = family.model_type == "gpt2" and isinstance(module, nn.Linear) and ours != "head.linear"
        for leaf, value in module.named_parameters(recurse=False):
            value = value.detach()
            if ours in ("embedder.tokens", "head.linear"):
                value = value[: c.vocab_size]
            sizes = {1: len(value), 2: c.hidden, 3: [c.n_embd, kv_dim, kv_dim]}[len(theirs)]
            for name, rows in zip(theirs, value.split(sizes), strict=True):
                yield f"{name}.{leaf}", rows.t() if conv1d else rows  # Conv1D holds the transposed matrix


def swap_halves(name: str, x: Tensor, head_dim: int) -> Tensor:
    """Swap the halves of each head in q and k: nanochat's RoPE rotates in the opposite direction."""
    if not re.search(r"\.[qk]_proj\.", name):
        return x
    return x.unflatten(0, (-1, 2, head_dim // 2)).flip(1).flatten(0, 2)


# ----------------------------------------------------------------------------------------------------------
# Export


def to_hf(model: GPT, tokenizer: Tokenizer, folder: str | Path) -> str:
    """Write the folder and return the name of its class of transformers. ValueError if none is equal."""
    folder, eot = Path(folder), tokenizer.eot
    family = min(FAMILIES, key=lambda family: len(unsupported(model.config, family.supported)))
    refuse(unsupported(model.config, family.supported), f"{family.name}, the nearest class of transformers")
    if model.config.window == 1 < model.config.block_size:  # its logits are right without a cache only
        refuse(["window=1"], f"{family.name} with a cache of keys and values")
    model = plain(model, **family.explicit)
    c, tensors = model.config, {}
    for name, view in views(model, family):
        view = swap_halves(name, view, c.head_dim) if family.model_type == "nanochat" else view
        tensors[name] = view.clone(memory_format=torch.contiguous_format)
    config = {
        "architectures": [family.name],
        "model_type": family.model_type,
        "dtype": str(view.dtype).removeprefix("torch."),
        "bos_token_id": eot,
        "eos_token_id": eot,
        "pad_token_id": None,
        **family.fixed,
    }
    config |= {theirs: getattr(c, ours) for theirs, ours in family.keys.items()}
    config["activation_function" if family.model_type == "gpt2" else "hidden_act"] = ACTIVATIONS[c.mlp][0]
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
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": EOT,
            "eos_token": EOT,
            "model_max_length": c.block_size,
            "clean_up_tokenization_spaces": False,
            "split_special_tokens": True,  # "<|endoftext|>" in a text is text
        },
        "generation_config.json": {"bos_token_id": eot, "eos_token_id": eot, "pad_token_id": eot},
        "config.json": config,
    }
    for name, data in files.items():
        (folder / name).write_text(json.dumps(data, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    (folder / "model.safetensors").write_bytes(safetensors.torch.save(tensors, {"format": "pt"}))
    return family.name


def eot_first(eot: int) -> dict:
    """Return the post-processor of tokenizer.json that puts end-of-text before each text."""
    special = {"SpecialToken": {"id": EOT, "type_id": 0}}, {"SpecialToken": {"id": EOT, "type_id": 1}}
    text = {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}
    return {
        "type": "TemplateProcessing",
        "single": [special[0], text[0]],
        "pair": [special[0], text[0], special[1], text[1]],
        "special_tokens": {EOT: {"id": EOT, "ids": [eot], "tokens": [EOT]}},
    }


# ----------------------------------------------------------------------------------------------------------
# Import


def from_hf(source: str | Path) -> tuple[GPT, Tokenizer]:
    """
    Read a folder with config.json, tokenizer.json and model.safetensors, or a Hub id.

    Ids follow our order: end-of-text is last, and the only special token. If the model uses a different BOS
    token, the embedding of end-of-text is the embedding of that token, and embedding and head are not tied.
    Raises ValueError for unsupported models, FileNotFoundError for missing files, and Unreachable
    if the Hub does not answer.
    """
    folder = local_folder(source)
    config = read_json(folder / "config.json", CONFIG)
    with naming(folder / "tokenizer.json"):
        tokenizer, ids, begin, end = read_tokenizer(folder / "tokenizer.json", config)
    files, index = ["model.safetensors"], folder / "model.safetensors.index.json"
    if index.exists():
        files = sorted(set(read_json(index, {"weight_map": {"*": NAME}})["weight_map"].values()))
    tensors = {}
    for file in files:
        with naming(folder / file):
            tensors |= safetensors.torch.load_file(folder / file)
    with naming(folder / "config.json"):
        family, c = read_config(config, tied="lm_head.weight" not in tensors)
    prefix = family.blocks.split(".")[0] + "."  # missing in the files of gpt2 itself
    tensors = {n if n.startswith((prefix, "lm_head.")) else prefix + n: x for n, x in tensors.items()}
    tokens, head = family.outer["embedder.tokens"] + ".weight", "lm_head.weight"
    weight = tensors.get(tokens)
    if c.tied and weight is not None and not torch.equal(tensors.setdefault(head, weight), weight):
        c = replace(c, tied=False)  # like transformers, which does not tie two different tensors
    c = replace(c, vocab_size=tokenizer.vocab_size, tied=c.tied and begin == end)
    machine.check_memory(c)
    model = GPT(c).eval()
    for name, view in views(model, family):
        value = tensors.pop(name, torch.empty(0))
        if name in (tokens, head) and value.dim() and len(value) > max(*ids, begin, end):
            value = value[[*ids, begin if name == tokens else end]]
        if value.shape != view.shape or not value.is_floating_point():
            found = f"shape {list(value.shape)} and {value.dtype}"
            raise ValueError(f"{source}: {name} has {found}, not {list(view.shape)} and a float")
        view.copy_(swap_halves(name, value, c.head_dim) if family.model_type == "nanochat" else value)
    redundant = r"^lm_head\.weight$|\.attn\.(masked_)?bias$|inv_freq$"  # old files hold masks and frequencies
    refuse([name for name in tensors if not re.search(redundant, name)][:1], f"a {family.name}")
    return model, tokenizer


def local_folder(source: str | Path, wanted: tuple[str, ...] = FILES) -> Path:
    """Return the folder that a path or a Hub id stands for, downloading `wanted` if not in the cache."""
    settings.check_path("hf:", source, "folder")
    if Path(source).is_dir():
        return Path(source)
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", str(source)):
        raise FileNotFoundError(f"there is no folder {source}")
    from huggingface_hub import HfApi, constants, snapshot_download
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        if not constants.HF_HUB_OFFLINE:
            tokenizers.within(4, lambda: HfApi().model_info(str(source), timeout=3))
        return Path(snapshot_download(str(source), allow_patterns=list(wanted), ignore_patterns=["*/*"]))
    except RepositoryNotFoundError:
        raise ValueError(f"there is no folder {source} here, nor such a model on the Hub") from None
    except Exception as error:
        raise Unreachable(
            f"{source} is no folder here, and the Hugging Face Hub cannot be reached "
            f"({type(error).__name__}): give a folder with its files"
        ) from None


def uniform_window(config: dict) -> tuple[dict, dict]:
    """
    Return a complete configuration of Qwen3 in which sliding_window holds for all layers, and the key, with
    its value, that makes it hold for some of them only.
    """
    window = config["sliding_window"] if config["use_sliding_window"] else None
    kinds = set(config["layer_types"] or [])
    key, value = "layer_types", " and ".join(sorted(kinds))
    if not kinds:
        key, value = "max_window_layers", config["max_window_layers"]
        ends = 0, config["num_hidden_layers"] - 1
        kinds = {"sliding_attention" if window and i >= value else "full_attention" for i in ends}
    everywhere = bool(window) and kinds == {"sliding_attention"}
    odd = {} if everywhere or kinds == {"full_attention"} else {key: value}
    return config | {"sliding_window": window if everywhere else None, "max_window_layers": None}, odd


def read_config(config: dict, tied: bool) -> tuple[Family, GPTConfig]:
    """Return the family and our configuration, with their vocab_size. `tied` is the default for that key."""
    family = next((family for family in FAMILIES if family.model_type == config["model_type"]), None)
    if family is None:
        known = ", ".join(family.model_type for family in FAMILIES)
        raise ValueError(f"model_type={config['model_type']} has no equivalent here; there are {known}")
    config, found, odd = family.defaults | config, {}, {}
    types = TYPES | {int: COUNT}
    check(config, {f"{k}?": types[type(getattr(GPTConfig, name))] for k, name in family.keys.items()})
    if family.model_type == "qwen3":
        config, odd = uniform_window(config)
    for theirs, ours in family.keys.items():
        value = config.get(theirs)
        if value is None and ours not in OPTIONAL:
            raise KeyError(theirs)
        if value is not None and found.setdefault(ours, value) != value:
            odd[theirs] = value  # two of their keys are one setting here, and differ
    rope = {
        key: config[key] for key in ("rope_theta", "partial_rotary_factor") if config.get(key) is not None
    }
    rope |= config.get("rope_scaling") or config.get("rope_parameters") or {}
    activation = config["activation_function" if family.model_type == "gpt2" else "hidden_act"]
    mlps = [mlp for mlp in family.supported["mlp"] if activation in ACTIVATIONS[mlp]]
    fixed = family.fixed | {"head_dim": found["n_embd"] // found["n_head"]}
    odd |= {key: config[key] for key, value in fixed.items() if config.get(key) not in (value, None)}
    odd |= {key: rope[key] for key, value in ROPE.items() if rope.get(key, value) != value}
    odd |= {} if mlps else {"hidden_act": activation}
    refuse([f"{key}={value}" for key, value in odd.items()], "model.py")
    implied = {name: values[0] for name, values in family.supported.items() if values is not ANY}
    theta = float(rope.get("rope_theta", 10000.0))
    settings = implied | family.explicit | {"mlp": mlps[0], "rope_theta": theta, "tied": tied} | found
    c = GPTConfig(**settings)
    c.validate()
    return family, c


def read_tokenizer(path: Path, config: dict) -> tuple[Tokenizer, list[int], int, int]:
    """
    Return our tokenizer, the source ids in our order, and the source ids of BOS and EOS.
    tokenizer.json must be byte-level BPE with GPT-2's split into words, since tokenizer.py has no other.
    """
    data = read_json(path, TOKENIZER)
    byte = {char: b for b, char in tokenizers.byte_chars().items()}

    def to_bytes(text: str) -> bytes:
        return bytes(byte[char] for char in text)

    def unknown(why: str):
        raise ValueError(f"it {why}, for which tokenizer.py has no equivalent")

    bpe, split, added = data["model"], data.get("pre_tokenizer") or {}, data["added_tokens"]
    if split.get("type") == "Sequence" and len(split["pretokenizers"]) == 1:
        split = split["pretokenizers"][0]
    affixes = bpe.get("continuing_subword_prefix") or bpe.get("end_of_word_suffix")
    special = {token["content"]: token["id"] for token in added if token["special"]}
    if bpe.get("type", "BPE") != "BPE" or bpe.get("byte_fallback") or "ByteLevel" not in json.dumps(split):
        unknown("is no byte-level BPE")
    if split["type"] != "ByteLevel" or not split.get("use_regex", True) or split.get("add_prefix_space"):
        unknown("splits text into words in another way than GPT-2")
    if data.get("normalizer") or len(special) < len(added) or affixes:
        unknown("changes texts, or has added tokens that are not special")
    ids = {to_bytes(text): i for text, i in bpe["vocab"].items() if text not in special}
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in bpe["merges"]]
    pairs = [[to_bytes(part) for part in merge] for merge in merges]
    single = sorted((token for token in ids if len(token) == 1), key=ids.get)
    tokens = single + [b"".join(pair) for pair in pairs]
    ranks = {token: rank for rank, token in enumerate(tokens)}
    if len(single) != 256 or ranks.keys() != ids.keys() or len(ranks) != len(tokens):
        unknown("lacks some bytes, or has tokens that no merge makes, or two merges that make one")
    if [tokenizers.last_pair(token, ranks) for token in tokens[256:]] != pairs:
        unknown("merges in an order that does not follow from its tokens")

    end = config.get("eos_token_id")
    end = (end or [None])[0] if isinstance(end, list) else end
    if end not in special.values():
        raise ValueError(f"eos_token_id={end} in config.json is none of the special tokens in {path}")
    begin = config.get("bos_token_id")
    begin = begin if begin in special.values() else end
    if left_out := sorted(token for token, i in special.items() if i not in (begin, end)):
        warnings.warn(f"special tokens left out: {', '.join(left_out)}", stacklevel=3)
    bytes_only = tokens == [bytes([b]) for b in range(256)]
    tokenizer = Tokenizer("byte" if bytes_only else f"bpe{len(tokens) + 1}", tokens)
    if tokenizer.sha256 == GPT2_SHA256:
        tokenizer = Tokenizer("gpt2", tokens)
    return tokenizer, [ids[token] for token in tokens], begin, end
