"""
llama2.c (github.com/karpathy/llama2.c): the model file that run.c reads (version 0), and its tokenizer.bin.

run.c puts a space before a prompt and does not split the prompt into words. About one sentence in several
thousand of TinyStories is therefore tokenized differently, such as one with 'spell' in single quotes, where
our split makes 's a separate word.
"""

import struct
from pathlib import Path

import torch
from torch import Tensor

from model import GPT, rope_table
from nanostlm.formats import LLAMA, plain, refuse, unsupported
from nanostlm.tokenizer import Tokenizer

# The settings that run.c supports; it hard-codes norm_eps and rope_theta
RUN_C = LLAMA | dict(mlp=["swiglu"], bias=[False], norm_eps=[1e-5], rope_theta=[10000])


def to_llama2c(model: GPT, tokenizer: Tokenizer, path: str | Path) -> Path:
    """
    Write the model file, and tokenizer.bin beside it. Return the path of the latter.

    Ids are permuted, because run.c uses id 1 as BOS and EOS and id 3 + b for byte b. Ids 0 and 2 are unused
    by run.c and become the last two tokens of text.
    """
    path, eot = Path(path), tokenizer.eot
    refuse(unsupported(model.config, RUN_C), "llama2.c's run.c")
    model = plain(model, norm_weight=True)
    c, blocks = model.config, model.core.blocks
    single = [tokenizer.tokens.index(bytes([b])) for b in range(256)]
    *rest, zero, two = single + sorted(set(range(eot)) - set(single))
    order = [zero, eot, two, *rest, *range(eot + 1, tokenizer.vocab_size)]  # run.c's id -> our id
    qkv = [block.attn.qkv.weight.split((c.n_embd, *2 * [c.kv_heads * c.head_dim])) for block in blocks]
    gate_up = [block.mlp.fc.weight.split(c.hidden) for block in blocks]
    tensors = [
        model.embedder.tokens.weight[order],
        *(block.norm1.weight for block in blocks),
        *(interleave(q, c.head_dim) for q, k, v in qkv),
        *(interleave(k, c.head_dim) for q, k, v in qkv),
        *(v for q, k, v in qkv),
        *(block.attn.proj.weight for block in blocks),
        *(block.norm2.weight for block in blocks),
        *(gate for gate, up in gate_up),
        *(block.mlp.proj.weight for block in blocks),
        *(up for gate, up in gate_up),
        model.head.norm.weight,
        *rope_table(torch.arange(c.block_size), c.head_dim, c.rope_theta),  # run.c skips these two
        *([] if c.tied else [model.head.linear.weight[order]]),
    ]
    vocab_size = c.vocab_size if c.tied else -c.vocab_size  # negative: the head has weights of its own
    header = c.n_embd, c.hidden, c.n_layer, c.n_head, c.kv_heads, vocab_size, c.block_size
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        file.write(struct.pack("<7i", *header))
        for tensor in tensors:
            file.write(tensor.detach().numpy().astype("<f4").tobytes())
    with open(path.with_name("tokenizer.bin"), "wb") as file:
        file.write(struct.pack("<i", max(map(len, tokenizer.tokens))))
        for i in order:  # the pair with the highest score merges; one with -1e30 never does
            score, token = -1e30 if i >= eot else -i, tokenizer.tokens[i]
            file.write(struct.pack("<fi", score, len(token)) + token)
    return path.with_name("tokenizer.bin")


def interleave(x: Tensor, head_dim: int) -> Tensor:
    """Reorder rows of q or k: run.c pairs rows 2i and 2i + 1 of a head for RoPE, we i and i + head_dim/2."""
    return x.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)
