"""
The model: GPT(GPTConfig(...)), a decoder of three replaceable parts, as in "Super Tiny Language Models":

    embedder   ids (B, T)       -> (B, T, n_embd)
    core       (B, T, n_embd)   -> (B, T, n_embd)
    head       (B, T, n_embd)   -> logits (B, T, vocab_size), or the loss

    model = GPT(GPTConfig(vocab_size=4096, n_layer=4, n_head=2, n_embd=128))
    logits, _ = model(idx)              # idx (B, T) int64 -> (B, T, vocab_size)
    _, loss = model(idx, targets)       # mean cross-entropy in nats; targets of -1 are ignored

This file alone supports GPT-2 and Llama shapes and can be copied into other projects. Optional components are
in nanostlm/variants.py. The fast paths at the end compute the same results as the plain code above them.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class GPTConfig:
    n_layer: int = 6  # number of transformer blocks
    n_head: int = 6  # attention heads, each n_embd / n_head wide
    n_embd: int = 384  # width of the residual stream
    block_size: int = 256  # context length in tokens
    vocab_size: int = 50257  # number of token ids; train.py takes it from the tokenizer
    n_kv_head: int = 0  # key/value heads: 0 = n_head (multi-head), 1 = multi-query, between = grouped-query
    dropout: float = 0.0  # on embeddings, attention probabilities and the two outputs of each block
    bias: bool = False  # biases in the linear layers and in LayerNorm
    tied: bool = True  # one matrix for embedding and head (Press & Wolf 2017, arXiv 1608.05859)
    norm: str = "rmsnorm"  # rmsnorm | layernorm | none
    norm_eps: float = 1e-5  # added to the mean square (RMSNorm) or the variance (LayerNorm)
    norm_weight: bool = True  # learned scale in the norms; False as in nanochat
    embed_norm: bool = False  # one more norm right after the embedding
    qk_norm: bool = False  # RMSNorm of queries and keys in each head (arXiv 2302.05442), as in Qwen3
    position: str = "rope"  # rope | learned | sinusoidal | shaw | alibi | none
    rope_theta: float = 10000.0  # base of the wavelengths of RoPE and of the sinusoids
    shaw_clip: int = 16  # shaw: distances are clipped to this many tokens
    shaw_values: bool = False  # shaw: embeddings of the distances are added to the values too
    causal: bool = True  # False: tokens attend to both sides (experiments only; cannot generate)
    window: int = 0  # sliding window: a token attends to this many tokens, itself included; 0 = off
    separator: int = -1  # document masking: the id that begins a text; no attention across it; -1 = off
    mlp: str = "swiglu"  # swiglu | geglu (gated) | gelu | gelu_tanh | relu | relu2 | silu | tanh | leaky_relu
    mlp_ratio: float = 4.0  # hidden width / n_embd; gated MLPs take 2/3 of it, for as many parameters
    mlp_hidden: int = 0  # hidden width in numbers; 0 = from mlp_ratio
    share: str = "none"  # weights that all layers share: none | mlp | layers | lora (all but low-rank parts)
    lora_rank: int = 8  # share=lora: rank of each layer's own part
    init: str = "gpt2"  # gpt2 | zero (block outputs and an untied head start at 0) | fan_in
    softcap: float = 0.0  # logits become softcap * tanh(logits / softcap), as in Gemma 2; 0 = off
    z_loss: float = 0.0  # training adds z_loss * log(Z)^2, as in PaLM; 0 = off
    label_smoothing: float = 0.0  # part of the training target that is spread over the vocabulary
    pointer: bool = False  # the head can also copy tokens from the context (arXiv 1609.07843)
    pointer_loss: float = 0.02  # weight of the pointer's own loss in training; keeps its gradients up
    loss_chunk: int = 256  # tokens per chunk of the loss; 0 = all at once, and the logits are returned too

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head

    @property
    def kv_heads(self) -> int:
        return self.n_kv_head or self.n_head

    @property
    def hidden(self) -> int:
        """Hidden width of the MLP; a gated one has a multiple of 32."""
        gated = 32 * math.ceil(self.mlp_ratio * self.n_embd * 2 / 3 / 32)
        return self.mlp_hidden or (gated if self.mlp in GATES else round(self.mlp_ratio * self.n_embd))

    @property
    def padded_vocab(self) -> int:
        """Rows of the embedding and of the head: matrix products are faster with multiples of 64."""
        return 64 * math.ceil(self.vocab_size / 64)

    def validate(self) -> None:
        """Raise a one-line ValueError if the settings are invalid."""
        check_config(self)

    def estimate(self) -> dict[str, int]:
        """Counts of parameters and, per token, of FLOPs and activations."""
        return count_config(self)

    def memory(self, tokens: int, itemsize: int) -> int:
        """Approximate bytes to train on micro-batches of `tokens` tokens, in a dtype of `itemsize` bytes."""
        counts, logits = self.estimate(), (min(self.loss_chunk, tokens) or tokens) * self.padded_vocab
        states = 16 + 2 * itemsize * (itemsize < 4)  # float32: weights, gradients, optimizer; copies in dtype
        kept = (itemsize + 2) * counts["activations_per_token"]  # some are float32; fragmentation
        return states * counts["parameters"] + kept * tokens + (8 + itemsize) * logits


# ----------------------------------------------------------------------------------------------------------
# Positions and masks, shared by all layers


def sdpa(q: Tensor, k: Tensor, v: Tensor, attn_mask=None, is_causal=False, dropout=0.0) -> Tensor:
    """Attention of q (B, n_head, T, head_dim) over k and v (B, n_kv_head, S, head_dim); PyTorch's kernel."""
    attn_mask, grouped = None if attn_mask is None else attn_mask.to(q.dtype), q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, attn_mask, dropout, is_causal, enable_gqa=grouped)


class AttnInputs(NamedTuple):
    """Inputs of every attention layer besides x; T queries attend to S keys."""

    rope: tuple[Tensor, Tensor] | None  # cos and sin of the positions, (1 or (B, 1), T, head_dim / 2)
    attn_mask: Tensor | None  # added to the scores, broadcasts to (B, n_head, T, S)
    is_causal: bool  # whether attn_mask is None and causal masking applies
    distance: Tensor | None = None  # (T, S): query position - key position; None if not needed
    kernel: Callable[..., Tensor] = sdpa  # computes attention; called like sdpa


def rope_table(positions: Tensor, dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin of RoPE's angles (Su et al. 2021, arXiv 2104.09864): (...,) -> two of (..., dim / 2)."""
    frequency = theta ** (-torch.arange(0, dim, 2, device=positions.device, dtype=torch.float32) / dim)
    angle = positions.float().unsqueeze(-1) * frequency
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x (B, heads, T, head_dim); dimension i is paired with i + head_dim / 2, as in Hugging Face."""
    a, b = x.chunk(2, dim=-1)
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def attn_inputs(c: GPTConfig, idx: Tensor, segments: Tensor | None = None) -> tuple[Tensor, AttnInputs]:
    """Positions of idx (B, T) in their segments, (T,) or (B, T), and what attention without a cache needs."""
    T = idx.shape[1]
    if c.position == "learned" and T > c.block_size:
        raise ValueError(f"{T} tokens, but learned positions end at block_size={c.block_size}")
    steps = positions = torch.arange(T, device=idx.device)
    starts = None  # where the segment of each token starts
    if segments is None and c.separator >= 0:
        segments = (idx == c.separator).cumsum(dim=1)
    if segments is not None:  # positions start at 0 in each segment
        begins = F.pad(segments[:, 1:] != segments[:, :-1], (1, 0), value=True)
        starts = (steps * begins).cummax(dim=1).values
        positions = steps - starts
    plain = starts is None and c.position not in ("shaw", "alibi") and not 0 < c.window < T
    distance = steps[:, None] - steps if c.pointer or not plain else None
    mask = None if plain else make_attn_mask(c, distance, starts, starts)
    rope = rope_table(positions.unsqueeze(-2), c.head_dim, c.rope_theta) if c.position == "rope" else None
    kernel = cpu_attention if c.causal and idx.device.type == "cpu" else sdpa
    dense = c.pointer or c.dropout or c.position in ("shaw", "alibi")  # needs the mask itself
    if starts is not None and not dense and idx.is_cuda and torch.compiler.is_compiling():
        from nanostlm.variants import flex_attention

        mask, kernel = None, flex_attention(c, starts)
    return positions, AttnInputs(rope, mask, plain and c.causal and T > 1, distance, kernel)


# ----------------------------------------------------------------------------------------------------------
# Embedder, core, head


class RMSNorm(nn.RMSNorm):
    """x / rms(x) * weight, over the last dimension (Zhang & Sennrich 2019, arXiv 1910.07467)."""

    def forward(self, x: Tensor) -> Tensor:
        weight = None if self.weight is None else self.weight.to(x.dtype)
        return F.rms_norm(x, self.normalized_shape, weight, self.eps)


NORMS: dict[str, Callable[[GPTConfig], nn.Module]] = {
    "rmsnorm": lambda c: RMSNorm(c.n_embd, c.norm_eps, c.norm_weight),
    "layernorm": lambda c: nn.LayerNorm(c.n_embd, c.norm_eps, c.norm_weight, c.bias),  # arXiv 1607.06450
    "none": lambda c: nn.Identity(),
}


class Embedder(nn.Module):
    """ids (B, T) and their positions (T,) or (B, T) -> (B, T, n_embd)."""

    def __init__(self, c: GPTConfig):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(c.padded_vocab, c.n_embd), None
        if c.position == "learned":
            self.positions = nn.Embedding(c.block_size, c.n_embd)
        elif c.position == "sinusoidal":
            from nanostlm.variants import Sinusoids

            self.positions = Sinusoids(c)
        self.norm = NORMS[c.norm](c) if c.embed_norm else nn.Identity()
        self.drop = nn.Dropout(c.dropout)

    def forward(self, idx: Tensor, positions: Tensor) -> Tensor:
        x = self.tokens(idx)
        if self.positions is not None:
            x = x + self.positions(positions).to(x.dtype)
        return self.drop(self.norm(x))


class Attention(nn.Module):
    """Self-attention with n_kv_head groups of keys and values (arXiv 1706.03762, 2305.13245)."""

    def __init__(self, c: GPTConfig):
        super().__init__()
        self.n_head, self.n_kv_head, self.head_dim, self.dropout = c.n_head, c.kv_heads, c.head_dim, c.dropout
        self.qkv = nn.Linear(c.n_embd, (c.n_head + 2 * c.kv_heads) * c.head_dim, bias=c.bias)
        self.proj = nn.Linear(c.n_embd, c.n_embd, bias=c.bias)
        self.q_norm, self.k_norm = (
            RMSNorm(c.head_dim, c.norm_eps, c.norm_weight) if c.qk_norm else nn.Identity() for _ in "qk"
        )

    def forward(self, x: Tensor, attn: AttnInputs, layer: int = 0, cache=None) -> Tensor:
        B, T, C = x.shape
        qkv = self.qkv(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, all heads, T, head_dim)
        q, k, v = qkv.split((self.n_head, self.n_kv_head, self.n_kv_head), dim=1)
        q, k = self.q_norm(q), self.k_norm(k)
        if attn.rope is not None:
            q, k = rotate(q, *attn.rope), rotate(k, *attn.rope)
        if cache is not None:
            k, v = cache.update(layer, k, v)
        y = self.attend(q, k, v, attn)  # (B, n_head, T, head_dim)
        return self.proj(y.transpose(1, 2).reshape(B, T, C))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, attn: AttnInputs) -> Tensor:
        return attn.kernel(q, k, v, attn.attn_mask, attn.is_causal, self.dropout if self.training else 0.0)


def shaw_attention(c: GPTConfig) -> nn.Module:
    from nanostlm.variants import ShawAttention

    return ShawAttention(c)


ATTENTIONS: dict[str, Callable[[GPTConfig], nn.Module]] = {  # the attention layer of each `position`
    **dict.fromkeys(("rope", "learned", "sinusoidal", "alibi", "none"), Attention),
    "shaw": shaw_attention,
}


class MLP(nn.Module):
    """Feed-forward: proj(act(fc(x)))."""

    inputs = 1  # widths of `hidden` that fc computes

    def __init__(self, c: GPTConfig, act: Callable[[Tensor], Tensor]):
        super().__init__()
        self.act = act
        self.fc = nn.Linear(c.n_embd, c.hidden * self.inputs, bias=c.bias)
        self.proj = nn.Linear(c.hidden, c.n_embd, bias=c.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.act(self.fc(x)))


class GatedMLP(MLP):
    """proj(act(gate(x)) * up(x)), with gate and up in one matrix (Shazeer 2020, arXiv 2002.05202)."""

    inputs = 2

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.fc(x).chunk(2, dim=-1)
        return self.proj(self.act(gate) * up)


MLPS: dict[str, tuple[type[nn.Module], Callable[[Tensor], Tensor]]] = {  # layer and activation
    "swiglu": (GatedMLP, F.silu),
    "geglu": (GatedMLP, F.gelu),
    "gelu": (MLP, F.gelu),  # Hendrycks & Gimpel 2016, arXiv 1606.08415
    "gelu_tanh": (MLP, lambda x: F.gelu(x, approximate="tanh")),  # as in GPT-2
    "relu": (MLP, F.relu),
    "relu2": (MLP, lambda x: F.relu(x).square()),  # Primer (So et al. 2021, arXiv 2109.08668)
    "silu": (MLP, F.silu),
    "tanh": (MLP, torch.tanh),
    "leaky_relu": (MLP, F.leaky_relu),
}
GATES = tuple(name for name, (layer, _) in MLPS.items() if layer is GatedMLP)


class Block(nn.Module):
    """A pre-norm transformer layer."""

    def __init__(self, c: GPTConfig):
        super().__init__()
        mlp, act = MLPS[c.mlp]
        self.norm1, self.attn = NORMS[c.norm](c), ATTENTIONS[c.position](c)
        self.norm2, self.mlp = NORMS[c.norm](c), mlp(c, act)
        self.drop = nn.Dropout(c.dropout)

    def forward(self, x: Tensor, attn: AttnInputs, layer: int = 0, cache=None) -> Tensor:
        x = x + self.drop(self.attn(self.norm1(x), attn, layer, cache))
        return x + self.drop(self.mlp(self.norm2(x)))


class Core(nn.Module):
    """The stack of blocks, (B, T, n_embd) -> (B, T, n_embd). The last norm belongs to the head."""

    def __init__(self, c: GPTConfig):
        super().__init__()
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.n_layer))
        if c.share != "none":
            from nanostlm.variants import SHARES

            self.blocks = SHARES[c.share](self.blocks, c)

    def forward(self, x: Tensor, attn: AttnInputs, cache=None) -> Tensor:
        for layer, block in enumerate(self.blocks):
            x = block(x, attn, layer, cache)
        return x


def softcap(logits: Tensor, cap: float) -> Tensor:
    return cap * torch.tanh(logits / cap) if cap else logits


def cross_entropy(logits: Tensor, targets: Tensor, smoothing=0.0, z_loss=0.0, reduction="mean") -> Tensor:
    """
    Cross-entropy in float32 of logits (B, T, vocab_size) and targets (B, T), those of -1 ignored: the mean,
    or with reduction="none" that of each target, (B * T,), 0 where it is ignored.
    """
    logits, targets = logits.flatten(0, 1), targets.flatten()
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    kept = targets != -1
    nll = F.cross_entropy(logits, targets, ignore_index=-1, label_smoothing=smoothing, reduction="none")
    nll = (nll + z_loss * logits.logsumexp(-1).square()) * kept
    return nll if reduction == "none" else nll.sum() / kept.sum().clamp(min=1)


class Head(nn.Module):
    """Norm and projection: (B, T, n_embd) -> logits (B, T, vocab_size), without the vocabulary's padding."""

    def __init__(self, c: GPTConfig):
        super().__init__()
        self.config = c
        self.norm = NORMS[c.norm](c)
        self.linear = nn.Linear(c.n_embd, c.padded_vocab, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return softcap(self.linear(self.norm(x))[..., : self.config.vocab_size], self.config.softcap)

    def loss(self, x: Tensor, targets: Tensor, reduction: str = "mean") -> tuple[Tensor | None, Tensor]:
        """(None, loss), or (logits, loss) with loss_chunk=0. Smoothing and z-loss apply in training only."""
        c = self.config
        extra = (c.label_smoothing, c.z_loss) if self.training else (0.0, 0.0)
        if c.loss_chunk and not any(extra) and type(self.linear) is nn.Linear:  # not quantized
            return None, chunked_cross_entropy(self.norm(x), self.linear.weight, targets, c, None, reduction)
        logits = self(x)
        return None if c.loss_chunk else logits, cross_entropy(logits, targets, *extra, reduction)


# ----------------------------------------------------------------------------------------------------------
# GPT and its initialization


class GPT(nn.Module):
    """
    The whole model. Custom modules can replace the three parts: an embedder called with (ids, positions), a
    core called with (x, attn, cache), a head with forward(x) and loss(x, targets).
    """

    def __init__(self, config: GPTConfig, embedder=None, core=None, head=None):
        super().__init__()
        config.validate()
        self.config = config
        self.embedder = Embedder(config) if embedder is None else embedder
        self.core = Core(config) if core is None else core
        self.head = Head(config) if head is None else head
        self.token_losses = head is None  # whether reduction="none" is available
        self.pointer = None
        if config.pointer:
            from nanostlm.variants import Pointer

            self.pointer = Pointer(config)
        if config.tied and embedder is None and head is None:
            self.head.linear.weight = self.embedder.tokens.weight
        init_weights(self, [part for part in (embedder, core, head) if part is not None])

    def forward(self, idx, targets=None, cache=None, segments=None, last=False, reduction="mean"):
        """
        idx (B, T) int64 -> (logits (B, T, vocab_size), None); with targets (B, T) -> (None, mean loss, nats).
        cache: a KVCache (nanostlm/kv_cache.py) of the previous tokens; idx is appended to it. segments
        (B, T): runs of equal numbers are independent documents; overrides config.separator. last: the logits
        of the last position only, (B, 1, vocab_size). reduction="none": the loss of each target, (B * T,), 0
        where it is -1; without gradients. With a pointer, logits are log-probabilities.
        """
        x, head = self.states(idx, cache, segments)
        if targets is not None:
            return head.loss(x, targets, *(() if reduction == "mean" else (reduction,)))
        return head(x[:, -1:] if last else x), None

    def states(self, idx, cache=None, segments=None) -> tuple[Tensor, nn.Module]:
        """The states (B, T, n_embd) after the core, and the head for them, with what the pointer copies."""
        if cache is None:
            positions, attn = attn_inputs(self.config, idx, segments)
        else:
            positions, attn = cache.begin(idx, segments)
        x, head = self.core(self.embedder(idx, positions), attn, cache), self.head
        if self.pointer is not None:
            head = self.pointer(x, idx, attn, cache).mixed_with(head)
        if cache is not None:
            cache.advance(idx.shape[1])
        return x, head

    @torch.no_grad()
    def generate(self, idx: Tensor, max_new_tokens: int, temperature=1.0, top_k: int | None = None) -> Tensor:
        """
        Continue idx (B, T) int64, T >= 1, by max_new_tokens sampled ids -> (B, T + max_new_tokens). Greedy at
        temperature 0. This is the plain loop; nanostlm/generate.py has a KV cache, samplers, and streaming.
        """
        for _ in range(max_new_tokens):
            logits = self(idx[:, -self.config.block_size :], last=True)[0][:, -1].float()
            if top_k:
                kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
                logits = logits.masked_fill(logits < kth, -torch.inf)
            if temperature > 0:
                new = torch.multinomial((logits / temperature).softmax(dim=-1), 1)
            else:
                new = logits.argmax(dim=-1, keepdim=True)
            idx = torch.cat((idx, new), dim=1)
        return idx


def gpt2_std(c: GPTConfig, name: str, fan_in: int) -> float:
    """Radford et al. 2019: 0.02, divided by sqrt(2 n_layer) for layers that write to the residual stream."""
    return 0.02 / math.sqrt(2 * c.n_layer) if name.endswith("proj") else 0.02


def init_weights(model: GPT, given: list[nn.Module]) -> None:
    """Draw matrices from N(0, std^2), std by config.init; biases 0. Custom parts keep their weights."""
    c, std_of, done = model.config, gpt2_std, {id(p) for part in given for p in part.parameters()}
    if c.init != "gpt2" or c.share == "lora":
        from nanostlm.variants import init_std as std_of
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear | nn.Embedding) or id(module.weight) in done:
            continue
        done.add(id(module.weight))  # a tied head shares the embedding's weight
        nn.init.normal_(module.weight, std=std_of(c, name, module.weight.shape[-1]))
        if getattr(module, "bias", None) is not None:
            nn.init.zeros_(module.bias)


# ----------------------------------------------------------------------------------------------------------
# Masks for windows and segments; checks and counts of a configuration


def make_attn_mask(c: GPTConfig, distance: Tensor, starts=None, key_starts=None) -> Tensor:
    """
    The attention mask: a query attends to a key of the same segment at 0 <= distance < window (|distance| <
    window if not causal). distance (T, S); starts (B, T) and key_starts (B, S): where the segments of queries
    and keys start. -> 0 or -inf, plus ALiBi's bias: (1 or B, 1 or n_head, T, S).
    """
    window = c.window or 2**31
    visible = (distance < window) & (distance >= 0 if c.causal else distance > -window)
    visible = visible[None, None]
    if starts is not None:
        visible = visible & (starts[:, None, :, None] == key_starts[:, None, None, :])
    mask = torch.zeros_like(visible, dtype=torch.float32).masked_fill(~visible, -torch.inf)
    if c.position == "alibi":
        from nanostlm.variants import alibi

        mask = mask + alibi(c.n_head, distance)
    return mask


CHOICES = {  # the settings that select a component by name
    "norm": tuple(NORMS),
    "position": tuple(ATTENTIONS),
    "mlp": tuple(MLPS),
    "share": ("none", "mlp", "layers", "lora"),
    "init": ("gpt2", "zero", "fan_in"),
}
RANGES = {  # the lowest and the highest value of the settings that are numbers; of others 0 and 10**9
    **dict.fromkeys(("n_layer", "n_head", "n_embd", "block_size", "vocab_size"), (1, 10**9)),
    **dict.fromkeys(("shaw_clip", "lora_rank"), (1, 10**9)),
    **dict.fromkeys(("dropout", "label_smoothing"), (0, 0.999)),
    "rope_theta": (1, 10**12),
    "separator": (-1, 10**9),
}


def check_settings(config: Any, ranges: dict[str, tuple], choices: dict[str, Any]) -> None:
    """ValueError unless the fields of a dataclass have the types of their defaults, and valid values."""
    for field in fields(config):
        name, value, kind = field.name, getattr(config, field.name), type(field.default)
        low, high = ranges.get(name, (0, 10**9))
        if kind in (bool, int, float, str) and type(value) not in (kind, int if kind is float else kind):
            raise ValueError(f"{name} must be of type {kind.__name__}, not {value!r:.60}")
        if kind in (int, float) and not low <= value <= high:  # also refuses nan
            raise ValueError(f"{name} must be between {low:,} and {high:,}, not {value!r:.60}")
        if name in choices and value not in choices[name]:
            one_of = ", ".join(filter(None, choices[name]))
            raise ValueError(f"{name} must be one of {one_of}; not {value!r:.60}")


def check_config(c: GPTConfig) -> None:
    check_settings(c, RANGES, CHOICES)
    odd = c.position == "rope" and c.head_dim % 2
    mixed = c.pointer and (c.label_smoothing or c.z_loss or not c.causal)
    wrong = {
        f"n_head={c.n_head} does not divide n_embd={c.n_embd}": c.n_embd % c.n_head,
        f"n_kv_head={c.n_kv_head} does not divide n_head={c.n_head}": c.n_head % c.kv_heads,
        f"rope needs an even head width, and n_embd / n_head is {c.head_dim}": odd,
        f"mlp_ratio={c.mlp_ratio} makes an MLP of width 0": c.hidden < 1,
        f"separator={c.separator} must be less than vocab_size={c.vocab_size}": c.separator >= c.vocab_size,
        "a pointer needs causal=True, label_smoothing=0 and z_loss=0": mixed,
    }
    for message, holds in wrong.items():
        if holds:
            raise ValueError(message)


def count_config(c: GPTConfig) -> dict[str, int]:
    """
    Parameters, shared ones once; those of embedder and head; FLOPs of a token's forward and backward pass: 6
    per weight of a matrix and 12 * block_size * n_embd per layer; and the approximate number of activations
    per token that are saved for the backward pass.
    """
    C, d, L, pointer, masked = c.n_embd, c.head_dim, c.n_layer, c.pointer, c.separator >= 0
    norm = C * c.norm_weight * {"rmsnorm": 1, "layernorm": 1 + c.bias, "none": 0}[c.norm]
    qkv, fc = (c.n_head + 2 * c.kv_heads) * d, c.hidden * (2 if c.mlp in GATES else 1)  # rows
    attn, mlp = C * qkv + C * C, C * fc + c.hidden * C  # weights
    distances = (c.position == "shaw") * (2 * c.shaw_clip + 1)
    shaw, of_layer = distances * (1 + c.shaw_values) * d, 14 * C + 3 * c.hidden + c.n_head * distances
    lora = (c.share == "lora") * c.lora_rank * (5 * C + qkv + fc + c.hidden)
    rest = 2 * norm + 2 * d * c.qk_norm * c.norm_weight + shaw + lora  # of a layer
    # number of distinct attention modules, MLPs and remaining parameters
    n = {"none": (L, L, L), "mlp": (L, 1, L), "layers": (1, 1, 1), "lora": (1, 1, L)}[c.share]
    core = n[0] * (attn + c.bias * (qkv + C)) + n[1] * (mlp + c.bias * (fc + C)) + n[2] * rest
    embedding = c.padded_vocab * C * (2 - c.tied) + norm * (1 + c.embed_norm)
    embedding += (c.position == "learned") * c.block_size * C
    matrices = L * (attn + mlp + shaw + lora) + c.padded_vocab * C + pointer * 3 * C * C
    return {
        "parameters": embedding + core + pointer * (3 * C * C + 2),
        "embedding_parameters": embedding,
        "flops_per_token": 6 * matrices + 6 * (2 * L + pointer) * c.block_size * C,
        "activations_per_token": L * of_layer + (12 * pointer + 5 * masked) * c.block_size,
    }


# ----------------------------------------------------------------------------------------------------------
# Fast paths: causal attention by blocks on a CPU, cross-entropy in chunks


def cpu_attention(q, k, v, attn_mask, is_causal, dropout) -> Tensor:
    """sdpa for causal models on a CPU; uses BlockAttention where it is faster (bench/attention.py)."""
    T, fixed = q.shape[2], is_causal or attn_mask is not None and not attn_mask.requires_grad
    faster = q.dtype == torch.bfloat16 or q.shape[3] >= 64
    if not (fixed and faster and 1 < T <= 1024 and not dropout):
        return sdpa(q, k, v, attn_mask, is_causal, dropout)
    if q.shape[1] != k.shape[1]:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    return BlockAttention.apply(q, k, v, None if attn_mask is None else attn_mask.to(q.dtype))


class BlockAttention(torch.autograd.Function):
    """
    Causal attention of q, k, v (B, n_head, T, head_dim), in blocks of 64 queries, each over the keys up to
    its last query; the probabilities are saved for the backward pass. attn_mask, which broadcasts to (B,
    n_head, T, T), must hide later keys itself.
    """

    @staticmethod
    def forward(ctx, q, k, v, attn_mask):
        shape, T = q.shape, q.shape[2]
        q, k, v = (x.contiguous().flatten(0, 1) for x in (q * shape[-1] ** -0.5, k, v))
        if attn_mask is None:
            attn_mask = q.new_full((T, T), -torch.inf).triu(1)
        y, probs = torch.empty_like(q), []
        ctx.blocks = [(slice(i, i + 64), slice(0, i + 64)) for i in range(0, T, 64)]  # queries, keys
        for queries, keys in ctx.blocks:
            score = q[:, queries] @ k[:, keys].mT
            score.view(*shape[:2], *score.shape[1:]).add_(attn_mask[..., queries, keys])
            probs.append(score.softmax(dim=-1))
            y[:, queries] = probs[-1] @ v[:, keys]
        ctx.save_for_backward(q, k, v, *probs)
        return y.view(shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        q, k, v, *probs = ctx.saved_tensors
        shape, dy = grad.shape, grad.contiguous().flatten(0, 1)
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for (queries, keys), p in zip(ctx.blocks, probs, strict=True):
            dscore = torch._softmax_backward_data(dy[:, queries] @ v[:, keys].mT, p, -1, p.dtype)
            dq[:, queries] = dscore @ k[:, keys]
            dk[:, keys] += dscore.mT @ q[:, queries]
            dv[:, keys] += p.mT @ dy[:, queries]
        return *(x.view(shape) for x in (dq * shape[-1] ** -0.5, dk, dv)), None


def chunked_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    c: GPTConfig,
    mixture: tuple[Tensor, Tensor] | None = None,
    reduction: str = "mean",
) -> Tensor:
    """
    cross_entropy of softcap(x @ weight.T), x (B, T, n_embd) and weight (padded_vocab, n_embd), for
    c.loss_chunk tokens at a time. With mixture=(gate, copied), each (B * T,) and a logarithm, the probability
    of a target is exp(gate) * softmax + exp(copied). reduction="none" has no gradient.
    """
    x, device = x.flatten(0, 1), x.device.type
    autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if autocast else x.dtype
    gate, copied = mixture or (None, None)
    mean = reduction == "mean"
    learn = mean and torch.is_grad_enabled()
    return ChunkedCrossEntropy.apply(x, weight, targets.flatten(), gate, copied, dtype, learn, mean, c)


class ChunkedCrossEntropy(torch.autograd.Function):
    """
    With `learn`, the forward pass also computes the gradient of each chunk right away, so that logits are
    neither stored nor recomputed. With 50,257 ids they would take most of a small model's memory.
    """

    @staticmethod
    def forward(ctx, x, weight, targets, gate, copied, dtype, learn, mean, c):
        count = (targets >= 0).sum().clamp(min=1)
        w, V = weight.to(dtype), c.vocab_size
        total = x.new_zeros((), dtype=torch.promote_types(x.dtype, torch.float32))
        each, dx, dgate, dcopied = [], [], [], []
        dw = torch.zeros_like(weight, dtype=total.dtype) if learn else None
        # chunks share buffers, which then stay in the CPU cache
        rows = min(len(x), c.loss_chunk)
        wide, probs = (w.new_empty(rows, len(w), dtype=total.dtype) for _ in range(2))
        narrow = wide if dtype == total.dtype else w.new_empty(rows, len(w))
        for start in range(0, len(x), c.loss_chunk):
            chunk = slice(start, start + c.loss_chunk)
            xc, y, n = x[chunk].to(dtype), targets[chunk], len(x[chunk])
            kept, y = (y >= 0).to(total.dtype), y.clamp(min=0)[:, None]
            torch.mm(xc, w.t(), out=narrow[:n])
            logits = softcap(wide[:n].copy_(narrow[:n]), c.softcap)  # (n, padded_vocab)
            logits[:, V:] = -torch.inf
            target = logits.gather(1, y)[:, 0]
            slope = 1 - (logits / c.softcap).square() if c.softcap and learn else None  # of the softcap
            top = logits.amax(dim=-1)
            grad = torch.softmax(logits, dim=-1, out=probs[:n])  # the maximum is 1 / sum(exp(logits - top))
            nll = top - grad.amax(dim=-1).log() - target
            share = 1.0  # the vocabulary's part of the target's probability
            if gate is not None:
                mine = gate[chunk] - nll
                nll = -torch.logaddexp(mine, copied[chunk])
                share = (mine + nll).exp()
                dgate.append(-share * kept)
                dcopied.append((share - 1) * kept)
            if not mean:
                each.append(nll * kept)
                continue
            total = total + (nll * kept).sum()
            if not learn:
                continue
            # d nll / d logits; divided by count only at the end, because fp16 would underflow
            grad.mul_((kept * share)[:, None])
            grad.scatter_add_(1, y, (-kept * share)[:, None])
            if slope is not None:
                slope[:, V:] = 0
                grad *= slope
            grad = narrow[:n].copy_(grad)
            dx.append((grad @ w).to(total.dtype))
            dw += grad.t() @ xc
        if learn:
            mixture = (torch.cat(g) / count if g else None for g in (dgate, dcopied))
            ctx.save_for_backward(
                (torch.cat(dx) / count).to(x.dtype), (dw / count).to(weight.dtype), *mixture
            )
        return total / count if mean else torch.cat(each)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        dx, dw, *mixture = (g if g is None else g * grad for g in ctx.saved_tensors)
        return dx, dw, None, *mixture, None, None, None, None
