"""
Models of Hugging Face behind our interface: any AutoModelForCausalLM, with its tokenizer.

    model, tokenizer = load("hf:gpt2")              # a Hub id, or a folder: hf:out/tiny-hf
    texts = stories(model, tokenizer, "Once upon a time")
    nats = score(model, [tokenizer.encode(text)], tokenizer.eot)

transformers itself computes the logits, so that every architecture that it knows is scored and sampled by the
same code as ours. (`train.py --init_from=hf:` is another thing: it converts a few architectures into GPT.)
"""

import inspect
import json
import re
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from model import cross_entropy
from nanostlm import machine
from nanostlm import tokenizer as tokenizers
from nanostlm.fast_decoding import to_float32
from nanostlm.formats.hf import local_folder

# The longest context that we use: scoring computes the logits of whole windows at once, and with 50,257 ids,
# those of a single window of 2,048 tokens take 400 MB. Stories are shorter than that.
MAX_CONTEXT = 2048
FILES = ("*.json", "*.txt", "*.model", "*.safetensors")  # of a model on the Hub, but for old weights
OLD_WEIGHTS = ("pytorch_model*.bin",)

# ----------------------------------------------------------------------------------------------------------
# Tokenizer


class HFTokenizer:
    """
    A tokenizer of transformers with the interface of nanostlm.tokenizer.Tokenizer, for a model that predicts
    `columns` ids. ValueError if the tokenizer has others, or no EOS and no BOS.

    `eot` is the tokenizer's EOS, else its BOS: the id that ends a text. `bos` is its BOS, else its EOS: what
    the model is given in place of `eot`.

    decode_bytes is exact for byte-level BPE (GPT-2, Llama 3) and for pieces in the style of SentencePiece
    (Llama 2, Gemma), which mark a space by "▁" and spell rare characters in tokens such as <0xF0>. The bytes
    of any other token are the text that transformers' decode adds for it after another token.

    Many tokenizers put a space before a text, which `decode` removes. decode_bytes does not, as its ids
    may continue a text.
    """

    def __init__(self, hf, columns: int):
        backend = json.loads(hf.backend_tokenizer.to_str()) if hf.is_fast else {"model": {}}
        eos, bos, vocab = hf.eos_token_id, hf.bos_token_id, hf.get_vocab()
        if eos is None and bos is None:
            raise ValueError("it has neither an EOS nor a BOS token")
        self.hf, self.eot, self.bos = hf, bos if eos is None else eos, eos if bos is None else bos
        self.added = hf.added_tokens_decoder
        special = {i for i, token in self.added.items() if token.special}
        if (most := max({*vocab.values()} - special | {self.eot, self.bos})) >= columns:
            raise ValueError(f"it has the id {most}, and the model predicts {columns} ids only")
        self.spelling = {i: token for token, i in vocab.items() if i < columns}
        if not (ordinary := self.spelling.keys() - special):  # AutoTokenizer makes it without any files
            raise ValueError("it has special tokens only: the folder lacks a tokenizer.json")
        self.ordinary = min(ordinary)
        self.vocab_size = max(self.spelling) + 1
        self.name = f"{backend['model'].get('type') or type(hf).__name__} of {self.vocab_size:,} ids"
        self.decoder = str(backend.get("decoder"))
        self.byte = {char: bytes([b]) for b, char in tokenizers.byte_chars().items()}
        self.token = lru_cache(maxsize=None)(self.spell)
        self.letters = {}  # of the special tokens, which Unigram finds in a text
        for i in (self.eot, self.bos):
            ids = [vocab.get(char, hf.unk_token_id) for char in self.spelling[i]]
            self.letters[i] = [j for j in ids if j not in (None, self.eot, self.bos)]
        self.puts_space = self.decode_bytes(self.encode("a")).startswith(b" ")

    def encode(self, text: str) -> list[int]:
        """Without BOS and EOS. ValueError if the text is not valid Unicode."""
        tokenizers.checked(text)
        options = dict(add_special_tokens=False, split_special_tokens=True, verbose=False)
        return [j for i in self.hf.encode(text, **options) for j in self.letters.get(i, [i])]

    def spell(self, i: int) -> bytes:
        """The bytes of a token. An id that no token has is empty."""
        text = self.spelling.get(i, "")
        if "ByteLevel" in self.decoder:
            return text.encode() if i in self.added else b"".join(self.byte[char] for char in text)
        if "ByteFallback" in self.decoder and re.fullmatch("<0x[0-9A-F]{2}>", text):
            return bytes([int(text[3:5], 16)])
        if "▁" in self.decoder:
            return text.replace("▁", " ").encode()
        if not text:
            return b""
        alone, after = [self.ordinary], [self.ordinary, i]
        alone, after = (self.hf.decode(ids, clean_up_tokenization_spaces=False) for ids in (alone, after))
        return (after.removeprefix(alone) if after.startswith(alone) else text).encode()

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """May begin or end inside a character. ValueError for an invalid id."""
        ids = [int(i) for i in ids]
        if bad := [i for i in ids if not 0 <= i < self.vocab_size]:
            raise ValueError(f"{bad[0]} is not a valid id of a tokenizer with {self.vocab_size:,} ids")
        return b"".join(map(self.token, ids))

    def decode(self, ids: Sequence[int]) -> str:
        """Invalid UTF-8 becomes U+FFFD."""
        text = self.decode_bytes(ids).decode("utf-8", errors="replace")
        return text.removeprefix(" ") if self.puts_space else text


# ----------------------------------------------------------------------------------------------------------
# Model


@dataclass(frozen=True)
class HFConfig:
    """What our code reads of a GPTConfig."""

    parameters: int
    vocab_size: int  # of the tokenizer
    block_size: int
    n_layer: int
    n_head: int
    kv_heads: int
    n_embd: int
    head_dim: int
    causal: bool = True
    separator: int = -1
    dropout: float = 0.0
    share: str = "none"
    tied: bool = False

    def validate(self) -> None:
        """transformers has checked it."""

    def estimate(self) -> dict[str, int]:
        return {"parameters": self.parameters}


def config_of(model: nn.Module, vocab_size: int) -> HFConfig:
    c = model.config.get_text_config()
    heads, width = getattr(c, "num_attention_heads", 1), c.hidden_size  # Mamba has no heads
    return HFConfig(
        parameters=sum(p.numel() for p in model.parameters()),
        vocab_size=vocab_size,
        block_size=min(getattr(c, "max_position_embeddings", None) or MAX_CONTEXT, MAX_CONTEXT),
        n_layer=c.num_hidden_layers,
        n_head=heads,
        kv_heads=getattr(c, "num_key_value_heads", None) or heads,
        n_embd=width,
        head_dim=getattr(c, "head_dim", None) or width // heads,
    )


class HFCache:
    """transformers' cache of a batch, and the mask of its tokens (B, S): 0 is padding on the left."""

    def __init__(self):
        self.past, self.mask = None, None

    def begin(self, idx: Tensor, segments: Tensor | None) -> dict[str, Any]:
        """The arguments of a pass over idx (B, T). Positions begin after the padding."""
        new = torch.ones_like(idx) if segments is None else (segments > 0).long()
        self.mask = new if self.mask is None else torch.cat((self.mask, new), dim=1)
        positions = (self.mask.cumsum(dim=1) - 1).clamp(min=0)[:, -idx.shape[1] :]
        return dict(past_key_values=self.past, attention_mask=self.mask, position_ids=positions)

    def select(self, rows: list[int]) -> None:
        """Index the batch by `rows`, with repetition allowed."""
        self.past.reorder_cache(torch.tensor(rows, device=self.mask.device))
        self.mask = self.mask[rows]


class HFModel(nn.Module):
    """
    A causal model of transformers with the interface of GPT. As an input, end-of-text becomes the BOS token,
    with which the model has learned that texts begin. Logits are those of the tokenizer's ids: columns
    that pad the vocabulary are cut off, and ids that the tokenizer lacks have -inf.
    """

    def __init__(self, hf: nn.Module, tokenizer: HFTokenizer):
        super().__init__()
        self.hf, self.config = hf, config_of(hf, tokenizer.vocab_size)
        self.eot, self.bos = tokenizer.eot, tokenizer.bos
        self.arguments = set(inspect.signature(hf.forward).parameters)
        known = torch.tensor([i in tokenizer.spelling for i in range(tokenizer.vocab_size)])
        self.register_buffer("unknown", None if known.all() else ~known)

    def new_cache(self, rows: int) -> HFCache | None:
        """An empty cache, for generate.Batch. None for the few models that have another kind, as Mamba."""
        return HFCache() if "past_key_values" in self.arguments else None

    def forward(self, idx, targets=None, cache=None, segments=None, last=False):
        """
        idx (B, T) int64 -> (logits (B, T, vocab_size) in float32, None); with targets (B, T) -> (None, mean
        loss). cache: what new_cache returned; segments (B, T), with the first pass only: 0 is padding, which
        is on the left. last: the logits of the last position only.
        """
        inputs = {"use_cache": cache is not None, "logits_to_keep": int(last)}
        inputs |= {} if cache is None else cache.begin(idx, segments)
        inputs = {name: value for name, value in inputs.items() if name in self.arguments}
        output = self.hf(input_ids=torch.where(idx == self.eot, self.bos, idx), **inputs)
        if cache is not None:
            cache.past = output.past_key_values
        logits = output.logits[:, -1:] if last else output.logits
        logits = to_float32(logits[..., : self.config.vocab_size])
        if self.unknown is not None:
            logits = logits.masked_fill(self.unknown, -torch.inf)
        return (logits, None) if targets is None else (None, cross_entropy(logits, targets))


# ----------------------------------------------------------------------------------------------------------
# Loading


@contextmanager
def reading(source: str, part: str) -> Iterator[None]:
    """Inside, what is raised about the files becomes a ValueError of one line, but for failures of a disk."""
    try:
        yield
    except Exception as error:
        if isinstance(error, MemoryError) or getattr(error, "errno", None):
            raise
        reason = textwrap.shorten(str(error), 300) or type(error).__name__
        raise ValueError(f"{source}: its {part} cannot be used: {reason}") from error


def load(
    source: str, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[HFModel, HFTokenizer]:
    """
    "hf:FOLDER_OR_ID" -> (model in eval mode, tokenizer). ValueError or FileNotFoundError for what is missing,
    or needs code from the Hub; Unreachable, within seconds, if the Hub does not answer.
    """
    try:
        from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging
    except ImportError:
        raise ValueError(f"{source} needs another package: pip install transformers") from None
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    name, options = source.removeprefix("hf:"), dict(trust_remote_code=False, local_files_only=True)
    folder = local_folder(name, FILES)
    if not any(folder.glob("*.safetensors")):
        folder = local_folder(name, FILES + OLD_WEIGHTS)
    with reading(source, "configuration"):
        config = AutoConfig.from_pretrained(folder, **options)
        with torch.device("meta"):  # takes no memory
            empty = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    with reading(source, "tokenizer"):
        hf = AutoTokenizer.from_pretrained(folder, **options)
        tokenizer = HFTokenizer(hf, config.get_text_config().vocab_size)
    machine.check_memory(config_of(empty, tokenizer.vocab_size), device)
    options |= dict(config=config, dtype=dtype, output_loading_info=True)
    with reading(source, "weights"):
        model, found = AutoModelForCausalLM.from_pretrained(folder, **options)
        if missing := sorted(found["missing_keys"]):  # transformers leaves them random
            raise ValueError(f"there are none for {missing[0]}")
    model = HFModel(model, tokenizer).to(device).eval()
    with torch.no_grad():  # BERT is an AutoModelForCausalLM too
        a, b = model(torch.tensor([[0, 0, 0], [0, 1, 2]], device=device))[0][:, 0]
    if not torch.allclose(a, b, rtol=0.01, atol=0.01, equal_nan=True):
        raise ValueError(f"{source} is not causal: its logits depend on the ids that they predict")
    return model, tokenizer
