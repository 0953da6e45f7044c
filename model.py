"""
The model: GPT(GPTConfig(...)), a decoder of three replaceable parts, as in "Super Tiny Language Models":

    embedder   ids (B, T)         -> (B, T, n_embd)
    core       (B, T, n_embd)     -> (B, T, n_embd)
    head       (B, T, n_embd)     -> logits (B, T, vocab_size), or the loss without ever holding all logits

The first half of this file is the default path, in the order in which data flow through it; the second half
holds the variants that a field of GPTConfig chooses. It imports nothing of ours: copy it where you like.

    model = GPT(GPTConfig(vocab_size=4096, n_layer=4, n_head=2, n_embd=128))
    logits, _ = model(idx)              # idx (B, T) int64 -> (B, T, vocab_size)
    _, loss = model(idx, targets)       # mean cross entropy in nats; targets of -1 do not count
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass
class GPTConfig:
    n_layer: int = 6  # number of transformer blocks
    n_head: int = 6  # attention heads; each is n_embd / n_head wide
    n_embd: int = 384  # width of the residual stream
    block_size: int = 256  # context length in tokens
    vocab_size: int = 50257  # ids in all; train.py takes it from the tokenizer
    n_kv_head: int = 0  # key/value heads: 0 = n_head (multi-head), 1 = multi-query, between = grouped-query
    dropout: float = 0.0  # on embeddings, attention weights and the two outputs of each block
    bias: bool = False  # biases in the linear layers and in LayerNorm
    tied: bool = True  # one matrix for the embedding and the head (Press & Wolf 2017, arXiv 1608.05859)
    norm: str = "rmsnorm"  # rmsnorm | layernorm | none
    norm_eps: float = 1e-5  # added to the mean square (RMSNorm) or the variance (LayerNorm)
    norm_weight: bool = True  # learned scale in the norms; False as in nanochat
    embed_norm: bool = False  # one more norm right after the embedding
    qk_norm: bool = False  # RMSNorm of queries and keys in each head (arXiv 2302.05442), as in Qwen3
    position: str = "rope"  # rope | learned | sinusoidal | shaw | alibi | none
    rope_theta: float = 10000.0  # base of RoPE's and the sinusoids' wave lengths
    shaw_clip: int = 16  # shaw: distances are clipped to this many tokens
    shaw_values: bool = False  # shaw: distances are added to the values too
    causal: bool = True  # False: every token sees every other (for the experiments; not for generation)
    window: int = 0  # sliding window: a token sees this many tokens, itself included; 0 = all of them
    mlp: str = "swiglu"  # swiglu | geglu (gated) | gelu | gelu_tanh | relu | relu2 | silu | tanh | leaky_relu
    mlp_ratio: float = 4.0  # hidden width / n_embd; gated ones take 2/3 of it, for as many parameters
    mlp_hidden: int = 0  # hidden width as a number; 0 = from mlp_ratio
    share: str = "none"  # none | mlp (one for all layers) | layers (one block) | lora (one, with low ranks)
    lora_rank: int = 8  # share=lora: rank of each layer's own part
    init: str = "gpt2"  # gpt2 | zero (outputs of blocks, and an untied head, start at nothing) | fan_in
    softcap: float = 0.0  # logits become softcap * tanh(logits / softcap), as in Gemma 2; 0 = off
    z_loss: float = 0.0  # training adds z_loss * log(Z)^2, as in PaLM; 0 = off
    label_smoothing: float = 0.0  # share of the training target spread over the vocabulary
    pointer: bool = False  # may also say a token of the context again, by pointing at it (arXiv 1609.07843)
    pointer_loss: float = 0.02  # training adds this times the pointer's own loss, or parts of it never learn
    loss_chunk: int = 256  # tokens whose logits exist at a time; 0 = all at once, and returned too

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head

    @property
    def kv_heads(self) -> int:
        return self.n_kv_head or self.n_head

    @property
    def hidden(self) -> int:
        """Width of the feed-forward's hidden layer; a gated one is matched in parameters."""
        if self.mlp_hidden:
            return self.mlp_hidden
        if self.mlp in GATES:
            return 32 * math.ceil(self.mlp_ratio * self.n_embd * 2 / 3 / 32)
        return round(self.mlp_ratio * self.n_embd)

    @property
    def padded_vocab(self) -> int:
        """Rows of the embedding and the head: matrix products like multiples of 64."""
        return 64 * math.ceil(self.vocab_size / 64)

    def validate(self) -> None:
        """Raise a ValueError with one clear line if these settings make no model."""
        positive = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size", "shaw_clip", "lora_rank")
        for name, value in asdict(self).items():
            kind = type(getattr(GPTConfig, name))
            if type(value) is not kind and not (kind is float and type(value) is int):
                raise ValueError(f"{name} must be of type {kind.__name__}, not {value!r}")
            if kind is not str and not (name in positive) <= value < math.inf:  # also refuses nan
                raise ValueError(f"{name} must be at least {int(name in positive)}, not {value}")
        for field, table in dict(norm=NORMS, position=POSITIONS, mlp=MLPS, share=SHARES, init=INITS).items():
            if getattr(self, field) not in table:
                raise ValueError(f"{field} must be one of {', '.join(table)}; not {getattr(self, field)!r}")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_head={self.n_head} does not divide n_embd={self.n_embd}")
        if self.n_head % self.kv_heads:
            raise ValueError(f"n_kv_head={self.n_kv_head} does not divide n_head={self.n_head}")
        if self.position == "rope" and self.head_dim % 2:
            raise ValueError(f"rope needs an even head width, and n_embd / n_head is {self.head_dim}")
        if not self.rope_theta > 0:
            raise ValueError(f"rope_theta must be more than 0, not {self.rope_theta}")
        if self.hidden < 1:
            raise ValueError(f"mlp_ratio={self.mlp_ratio} makes a feed-forward of width 0")
        for field in ("dropout", "label_smoothing"):
            if not getattr(self, field) < 1:
                raise ValueError(f"{field} must be less than 1, not {getattr(self, field)}")
        if self.pointer and (self.label_smoothing or self.z_loss or not self.causal):
            raise ValueError("a pointer needs causal=True, label_smoothing=0 and z_loss=0")


# ----------------------------------------------------------------------------------------------------------
# The default path: rotary positions, attention, feed-forward, block; embedder, core, head


class Place(NamedTuple):
    """Where the tokens of one pass stand. Made once a pass by `locate`, used by every layer."""

    rope: tuple[Tensor, Tensor] | None  # cos, sin: (T, head_dim/2), or (B, 1, T, head_dim/2)
    bias: Tensor | None  # added to the attention scores, broadcasts to (B, n_head, T, S); None = nothing
    causal: bool  # the plain causal mask is all that is needed
    distance: Tensor | None  # (T, S) query's position - key's position, where a part needs it


def rope_table(position: Tensor, dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin of RoPE's angles (Su et al. 2021, arXiv 2104.09864): (...,) -> two of (..., dim/2)."""
    frequency = theta ** (-torch.arange(0, dim, 2, device=position.device, dtype=torch.float32) / dim)
    angle = position.float().unsqueeze(-1) * frequency
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x (B, heads, T, head_dim); dimension i is paired with i + head_dim/2, as in Hugging Face."""
    a, b = x.chunk(2, dim=-1)
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class RMSNorm(nn.RMSNorm):
    """x / rms(x) * weight, over the last dimension (Zhang & Sennrich 2019, arXiv 1910.07467)."""

    def forward(self, x: Tensor) -> Tensor:
        weight = None if self.weight is None else self.weight.to(x.dtype)
        return F.rms_norm(x, self.normalized_shape, weight, self.eps)


class Attention(nn.Module):
    """Causal self-attention with n_kv_head groups of keys and values (arXiv 1706.03762, 2305.13245)."""

    def __init__(self, c: GPTConfig):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim, self.dropout = c.n_head, c.kv_heads, c.head_dim, c.dropout
        self.causal = c.causal
        self.qkv = nn.Linear(c.n_embd, (c.n_head + 2 * c.kv_heads) * c.head_dim, bias=c.bias)
        self.proj = nn.Linear(c.n_embd, c.n_embd, bias=c.bias)
        self.q_norm, self.k_norm = (
            RMSNorm(c.head_dim, c.norm_eps, c.norm_weight) if c.qk_norm else nn.Identity() for _ in "qk"
        )

    def forward(self, x: Tensor, place: Place, layer: int = 0, cache: "KVCache | None" = None) -> Tensor:
        B, T, C = x.shape
        qkv = self.qkv(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, all heads, T, head_dim)
        q, k, v = qkv.split((self.heads, self.kv_heads, self.kv_heads), dim=1)
        q, k = self.q_norm(q), self.k_norm(k)
        if place.rope is not None:
            q, k = rotate(q, *place.rope), rotate(k, *place.rope)
        if cache is not None:
            k, v = cache.extend(layer, k, v)
        y = self.attend(q, k, v, place)  # (B, heads, T, head_dim)
        return self.proj(y.transpose(1, 2).reshape(B, T, C))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, place: Place) -> Tensor:
        return self.sdpa(q, k, v, place.bias, place.causal)

    def sdpa(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        if torch.compiler.is_compiling() and q.device.type == "cpu" and q.shape[2] == 1 and not dropout:
            return one_query(q, k, v, bias)
        bias = None if bias is None else bias.to(q.dtype)
        grouped = self.heads != self.kv_heads
        blocks = self.causal and (causal or bias is not None and not bias.requires_grad) and not dropout
        blocks = blocks and q.device.type == "cpu" and 1 < q.shape[2] <= 1024
        if blocks and (q.dtype == torch.bfloat16 or self.head_dim >= 64):  # as bench/attention.py says
            if grouped:
                k, v = (x.repeat_interleave(self.heads // self.kv_heads, dim=1) for x in (k, v))
            return BlockAttention.apply(q, k, v, bias)
        return F.scaled_dot_product_attention(q, k, v, bias, dropout, is_causal=causal, enable_gqa=grouped)


def one_query(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """
    Attention of q (B, heads, 1, head_dim) by its formula in float32, over all of k and v (B, n_kv_head, S,
    head_dim). Compiled, it becomes one loop with what is around it, and no call of a kernel.
    """
    k, v = (x.float().repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    score = (q.float() * q.shape[-1] ** -0.5 * k).sum(dim=-1, keepdim=True)  # (B, heads, S, 1)
    score = score if bias is None else score + bias.mT
    return (score.softmax(dim=-2) * v).sum(dim=-2, keepdim=True).to(q.dtype)


def query_blocks(T: int, size: int = 64) -> list[tuple[slice, slice]]:
    """For each block of queries its place, and that of the keys up to its last."""
    return [(slice(i, min(T, i + size)), slice(0, min(T, i + size))) for i in range(0, T, size)]


class BlockAttention(torch.autograd.Function):
    """
    Causal attention by its formula for q, k, v (B, heads, T, head_dim), 64 queries at a time against the keys
    that they may see; the probabilities are kept for the backward pass. `bias`, broadcasting to (B, heads, T,
    T), has to hide what comes later itself. On a CPU faster than PyTorch's fused kernel (bench/attention.py).
    """

    @staticmethod
    def forward(ctx, q, k, v, bias):
        shape, T = q.shape, q.shape[2]
        q, k, v = (x.contiguous().flatten(0, 1) for x in (q * shape[-1] ** -0.5, k, v))
        if bias is None:
            bias = q.new_full((T, T), -torch.inf).triu(1)
        y, shares = torch.empty_like(q), []
        for some, seen in query_blocks(T):
            score = q[:, some] @ k[:, seen].mT
            score.view(*shape[:2], *score.shape[1:]).add_(bias[..., some, seen])
            shares.append(score.softmax(dim=-1))
            y[:, some] = shares[-1] @ v[:, seen]
        ctx.save_for_backward(q, k, v, *shares)
        return y.view(shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        q, k, v, *shares = ctx.saved_tensors
        shape, dy = grad.shape, grad.contiguous().flatten(0, 1)
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for (some, seen), share in zip(query_blocks(shape[2]), shares, strict=True):
            dshare = dy[:, some] @ v[:, seen].mT
            dscore = torch._softmax_backward_data(dshare, share, -1, share.dtype)  # in one pass
            dq[:, some] = dscore @ k[:, seen]
            dk[:, seen] += dscore.mT @ q[:, some]
            dv[:, seen] += share.mT @ dy[:, some]
        return *(x.view(shape) for x in (dq * shape[-1] ** -0.5, dk, dv)), None


class MLP(nn.Module):
    """Feed-forward: proj(act(fc(x))), or gated: proj(act(gate(x)) * up(x)) (arXiv 2002.05202)."""

    def __init__(self, c: GPTConfig):
        super().__init__()
        self.gated, self.act = c.mlp in GATES, MLPS[c.mlp]
        self.fc = nn.Linear(
            c.n_embd, c.hidden * (2 if self.gated else 1), bias=c.bias
        )  # gated: gate, then up
        self.proj = nn.Linear(c.hidden, c.n_embd, bias=c.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc(x)
        if self.gated:
            gate, up = x.chunk(2, dim=-1)
            return self.proj(self.act(gate) * up)
        return self.proj(self.act(x))


class Block(nn.Module):
    def __init__(self, c: GPTConfig):
        super().__init__()
        self.norm1, self.attn = NORMS[c.norm](c), ATTENTIONS.get(c.position, Attention)(c)
        self.norm2, self.mlp = NORMS[c.norm](c), MLP(c)
        self.drop = nn.Dropout(c.dropout)

    def forward(self, x: Tensor, place: Place, layer: int = 0, cache: "KVCache | None" = None) -> Tensor:
        x = x + self.drop(self.attn(self.norm1(x), place, layer, cache))
        return x + self.drop(self.mlp(self.norm2(x)))


class Embedder(nn.Module):
    """ids (B, T) and their positions (T,) or (B, T) -> (B, T, n_embd)."""

    def __init__(self, c: GPTConfig):
        super().__init__()
        self.config = c
        self.tokens = nn.Embedding(c.padded_vocab, c.n_embd)
        self.positions = nn.Embedding(c.block_size, c.n_embd) if c.position == "learned" else None
        self.norm = NORMS[c.norm](c) if c.embed_norm else nn.Identity()
        self.drop = nn.Dropout(c.dropout)

    def forward(self, idx: Tensor, position: Tensor) -> Tensor:
        x = self.tokens(idx)
        if self.positions is not None:
            x = x + self.positions(position)
        elif self.config.position == "sinusoidal":
            x = x + sinusoids(position, self.config.n_embd, self.config.rope_theta).to(x.dtype)
        return self.drop(self.norm(x))


class Core(nn.Module):
    """The stack of blocks, (B, T, n_embd) -> the same. The norm before the logits belongs to the head."""

    def __init__(self, c: GPTConfig):
        super().__init__()
        self.blocks = SHARES[c.share](nn.ModuleList(Block(c) for _ in range(c.n_layer)), c)

    def forward(self, x: Tensor, place: Place, cache: "KVCache | None" = None) -> Tensor:
        for layer, block in enumerate(self.blocks):
            x = block(x, place, layer, cache)
        return x


class Head(nn.Module):
    """Norm and projection: (B, T, n_embd) -> logits (B, T, vocab_size), the vocabulary's padding cut off."""

    def __init__(self, c: GPTConfig):
        super().__init__()
        self.config = c
        self.norm = NORMS[c.norm](c)
        self.linear = nn.Linear(c.n_embd, c.padded_vocab, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return softcap(self.linear(self.norm(x))[..., : self.config.vocab_size], self.config.softcap)

    def loss(
        self, x: Tensor, targets: Tensor, copies: "Copies | None" = None
    ) -> tuple[Tensor | None, Tensor]:
        """
        (None, loss), or (logits, loss) where loss_chunk is 0. Smoothing, z-loss and the own loss of a pointer
        (`copies`) count in training only. With smoothing or z-loss, all logits are computed at once.
        """
        c = self.config
        extra = (c.label_smoothing, c.z_loss) if self.training else (0.0, 0.0)
        gate, copied, own = (None, None, 0.0) if copies is None else copies.of(targets)
        own = c.pointer_loss * own if self.training else 0.0
        if c.loss_chunk == 0 or any(extra):
            logits = self(x) if copies is None else copies.mix(self(x))
            return None if c.loss_chunk else logits, cross_entropy(logits, targets, *extra) + own
        x, device, learn = self.norm(x).flatten(0, 1), x.device.type, torch.is_grad_enabled()
        mixed = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if mixed else x.dtype
        weight, targets = self.linear.weight, targets.flatten()
        loss = ChunkedCrossEntropy.apply(x, weight, targets, gate, copied, dtype, learn, c)
        return None, loss + own


class GPT(nn.Module):
    """
    The whole model. Any of the three parts may be given instead of built: an embedder called with (ids,
    positions), a core called with (x, place, cache), a head with `forward(x)` and `loss(x, targets)`;
    where the config has a pointer, `loss(x, targets, copies)`.
    """

    def __init__(self, config: GPTConfig, embedder=None, core=None, head=None):
        super().__init__()
        config.validate()
        self.config = config
        self.embedder = Embedder(config) if embedder is None else embedder
        self.core = Core(config) if core is None else core
        self.head = Head(config) if head is None else head
        self.pointer = Pointer(config) if config.pointer else None
        if config.tied and embedder is None and head is None:
            self.head.linear.weight = self.embedder.tokens.weight
        init_weights(self, [part for part in (embedder, core, head) if part is not None])

    def forward(
        self,
        idx: Tensor,
        targets: Tensor | None = None,
        cache: "KVCache | None" = None,
        segments: Tensor | None = None,
        last: bool = False,
    ) -> tuple[Tensor | None, Tensor | None]:
        """
        idx (B, T) int64 -> (logits (B, T, vocab_size), None); with targets (B, T) -> (None, mean loss, nats).
        `cache` goes on from the tokens that it has seen; `segments` (B, T) are runs of equal numbers, each a
        text of its own; `last` gives the logits of the last position only, (B, 1, vocab_size). With a pointer
        they are log-probabilities.
        """
        position, place = locate(self.config, idx, cache, segments)
        x = self.core(self.embedder(idx, position), place, cache)
        copies = None if self.pointer is None else self.pointer(x, idx, place, cache)
        if cache is not None:
            cache.advance(idx.shape[1])
        if targets is not None:
            return self.head.loss(x, targets, *([] if copies is None else [copies]))
        logits = self.head(x[:, -1:] if last else x)
        return logits if copies is None else copies.mix(logits), None

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Mean loss in nats of a batch (idx, targets), each (B, T)."""
        return self(*batch)[1]

    @torch.no_grad()
    def loglikelihood(self, prefix: list[int], continuation: list[int]) -> float:
        """
        Log-probability in nats of the ids `continuation` after the ids `prefix` (not empty: a text's first
        token stands after end-of-text). Each id sees at most block_size ids before it.
        """
        if not self.config.causal:
            raise ValueError("loglikelihood needs a causal model: this one sees the ids that it predicts")
        if not prefix:
            raise ValueError("loglikelihood needs a prefix; for the start of a text it is [end-of-text]")
        ids, T, total = [*prefix, *continuation], self.config.block_size, 0.0
        device = next(self.parameters()).device
        done = len(prefix)
        while done < len(
            ids
        ):  # the first window ends after block_size ids, each later one moves on by half a window
            end = min(len(ids), T + 1) if done < T + 1 else min(len(ids), done + max(1, T // 2))
            window = torch.tensor(ids[max(0, end - T - 1) : end], device=device)
            logp = F.log_softmax(self(window[None, :-1])[0][0].float(), dim=-1)
            total += logp.gather(1, window[1:, None])[done - end :].sum(dtype=torch.float64).item()
            done = end
        return total

    def num_params(self) -> dict[str, int]:
        """Parameters, shared ones once: `total` = `embedding` (embedder and head) + `core` (the blocks)."""
        total = sum(p.numel() for p in self.parameters())
        core = sum(p.numel() for part in (self.core, self.pointer) if part for p in part.parameters())
        return {"total": total, "embedding": total - core, "core": core}

    def flops_per_token(self) -> int:
        """Operations of a token's forward and backward: 6 a matrix's weight, 12 block_size n_embd a layer."""
        c = self.config
        per_layer = sum(p.numel() for p in self.core.blocks[0].parameters() if p.ndim == 2)
        matrices = c.n_layer * per_layer + c.padded_vocab * c.n_embd + c.pointer * 3 * c.n_embd**2
        return 6 * matrices + 6 * (2 * c.n_layer + c.pointer) * c.block_size * c.n_embd


class ChunkedCrossEntropy(torch.autograd.Function):
    """
    Mean cross entropy of the logits x @ weight.T, x (N, n_embd), weight (padded_vocab, n_embd), targets (N,),
    for a chunk of tokens at a time. With `learn` the gradient is made in the forward pass, while the chunk's
    logits are there: they are neither kept nor computed twice, and with 50,257 ids they would be most of a
    small model's memory. With a pointer's `gate` and `copied` (N,), the probability of a target is
    exp(gate) * softmax + exp(copied).
    """

    @staticmethod
    def forward(ctx, x, weight, targets, gate, copied, dtype, learn, c):
        count = (targets >= 0).sum().clamp(min=1)
        w, V = weight.to(dtype), c.vocab_size
        total = x.new_zeros((), dtype=torch.promote_types(x.dtype, torch.float32))
        dx, dw = [], torch.zeros_like(weight, dtype=total.dtype) if learn else None
        dgate, dcopied = [], []
        # the same memory for every chunk, so that it stays in the cache
        rows = min(len(x), c.loss_chunk)
        wide, soft = (w.new_empty(rows, len(w), dtype=total.dtype) for _ in range(2))
        narrow = wide if dtype == total.dtype else w.new_empty(rows, len(w))
        for start in range(0, len(x), c.loss_chunk):
            chunk = slice(start, start + c.loss_chunk)
            xc, y, n = x[chunk].to(dtype), targets[chunk], len(x[chunk])
            kept, y = (y >= 0).to(total.dtype), y.clamp(min=0)[:, None]
            torch.mm(xc, w.t(), out=narrow[:n])
            logits = softcap(wide[:n].copy_(narrow[:n]), c.softcap)  # (n, padded_vocab)
            logits[:, V:] = -torch.inf
            nll = -logits.gather(1, y)[:, 0]  # log_z is added below
            slope = 1 - (logits / c.softcap).square() if c.softcap and learn else None  # of the cap
            top = logits.amax(dim=-1)
            grad = torch.softmax(logits, dim=-1, out=soft[:n])  # its largest is 1 / sum of exp(x - top)
            log_z = top - grad.amax(dim=-1).log()
            nll, share = nll + log_z, 1.0  # share: how much of the target's probability is the vocabulary's
            if gate is not None:
                own = gate[chunk] - nll
                nll = -torch.logaddexp(own, copied[chunk])
                share = (own + nll).exp()
                dgate.append(-share * kept)
                dcopied.append((share - 1) * kept)
            total = total + (nll * kept).sum()
            if not learn:
                continue
            # d nll / d logits; divided by count only later: fp16 would round that to 0
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
        return total / count

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        dx, dw, *mixture = (g if g is None else g * grad for g in ctx.saved_tensors)
        return dx, dw, None, *mixture, *[None] * 3


def cross_entropy(logits: Tensor, targets: Tensor, smoothing: float = 0.0, z_loss: float = 0.0) -> Tensor:
    """The same loss from logits (B, T, vocab_size) that are all there."""
    logits, targets = logits.flatten(0, 1), targets.flatten()
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    kept = targets != -1
    nll = F.cross_entropy(logits, targets, ignore_index=-1, label_smoothing=smoothing, reduction="none")
    return ((nll + z_loss * logits.logsumexp(-1).square()) * kept).sum() / kept.sum().clamp(min=1)


def softcap(logits: Tensor, cap: float) -> Tensor:
    return cap * torch.tanh(logits / cap) if cap else logits


# ----------------------------------------------------------------------------------------------------------
# Where tokens stand: positions and masks of a pass, and the cache of keys and values


def locate(
    c: GPTConfig, idx: Tensor, cache: "KVCache | None", segments: Tensor | None
) -> tuple[Tensor, Place]:
    """The positions of idx (B, T), as (T,) or (B, T), and the Place that attention needs."""
    B, T = idx.shape
    seen = cache.seen if cache is not None else 0
    start = cache.start if cache is not None else None
    if c.position == "learned" and seen + T > c.block_size:
        raise ValueError(f"{seen + T} tokens, but learned positions end at block_size={c.block_size}")
    if seen and (T > 1 or segments is not None):
        raise ValueError("a cache takes the whole prompt in one pass, then one token at a time, no segments")
    position = torch.arange(T, device=idx.device) + (cache.position() if cache is not None else 0)
    if start is not None:
        position = (position - start[:, None]).clamp(min=0)  # (B, T): rows were padded on the left
    if segments is not None:  # each begins at position 0, as if it stood alone
        begins = F.pad(segments[:, 1:] != segments[:, :-1], (1, 0), value=True)
        position = position - (position * begins).cummax(dim=1).values
    rope = None
    if c.position == "rope":
        rope = rope_table(position if position.ndim == 1 else position[:, None], c.head_dim, c.rope_theta)
    window = c.window if cache is None else cache.size
    plain = start is None and segments is None and c.position not in BIASES and not (window and T > window)
    plain = plain and not (cache is not None and cache.whole)
    if plain and not c.pointer:
        return position, Place(rope, None, c.causal and T > 1, None)
    if seen:  # one token against the columns of the cache
        distance = cache.distance()[None]  # (1, S)
    else:
        steps = torch.arange(T, device=idx.device)
        distance = steps[:, None] - steps  # (T, S)
    if plain:
        return position, Place(rope, None, c.causal and T > 1, distance)
    # everything a token may see, from the distance alone
    visible = distance < window if window else torch.ones_like(distance, dtype=torch.bool)
    if c.causal:
        visible = visible & (distance >= 0)
    elif window:
        visible = visible & (distance > -window)
    visible = visible[None, None]
    if start is not None:  # a row's padding is seen by nothing but itself (a softmax needs something to see)
        visible = visible & ((distance <= position[:, None, :, None]) | (distance == 0))
    if segments is not None:
        visible = visible & (segments[:, None, :, None] == segments[:, None, None, :])
    bias = torch.zeros_like(visible, dtype=torch.float32).masked_fill(~visible, -torch.inf)
    if c.position == "alibi":
        bias = bias - alibi_slopes(c.n_head, idx.device)[:, None, None] * distance.abs()
    return position, Place(rope, bias, False, distance)


class KVCache:
    """
    Keys and values of the last `size` = min(block_size, window) tokens, allocated once, each (n_layer, B,
    n_kv_head, size, head_dim). Token p stands in column p mod size, so generation goes on past the context's
    end and each token sees the block_size tokens up to itself. `start` (B,) is how many columns of each row
    pad its prompt on the left. The first pass is the whole prompt; then one token at a time.
    """

    def __init__(
        self, c: GPTConfig, batch: int, device="cpu", dtype=torch.float32, start: Tensor | None = None
    ):
        if not c.causal:
            raise ValueError("only a causal model can generate with a cache")
        self.size = min(c.block_size, c.window or c.block_size)
        shape = (c.n_layer, batch, c.kv_heads, self.size, c.head_dim)
        self.k, self.v = (torch.zeros(shape, device=device, dtype=dtype) for _ in "kv")
        self.ids = torch.zeros(batch, self.size, 1, device=device, dtype=torch.int64)
        self.states = torch.zeros(batch, self.size, 2 * c.n_embd * c.pointer, device=device, dtype=dtype)
        self.start, self.seen = start, 0

    whole = False  # does it show columns that nothing stands in yet? At distance -1, then

    def position(self) -> int | Tensor:
        """Of the token to come."""
        return self.seen

    def advance(self, T: int) -> None:
        """T tokens have been seen."""
        self.seen += T

    def distance(self) -> Tensor:
        """How far back each column in use stands from the token to come: (columns,)."""
        columns = min(self.seen + 1, self.size)
        return (self.seen - torch.arange(columns, device=self.k.device)) % self.size

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store the new keys and values (B, n_kv_head, T, head_dim) and return those to attend to."""
        return self.keep(self.k[layer], k), self.keep(self.v[layer], v)

    def keep(self, store: Tensor, new: Tensor) -> Tensor:
        """Store what is new, (..., T, width), in its columns and return all that there is to see."""
        T = new.shape[-2]
        if T > 1 or not self.seen:  # the prompt: sees itself, and its last tokens stay
            columns = torch.arange(max(0, T - self.size), T, device=new.device)
            store[..., columns % self.size, :] = new[..., columns, :].to(store.dtype)
            return new
        at = self.seen % self.size
        store[..., at : at + 1, :] = new
        return store[..., : min(self.seen + 1, self.size), :]

    def select(self, rows: list[int]) -> None:
        """Make these rows of the batch the batch; a row may come more than once."""
        self.k, self.v = self.k[:, rows], self.v[:, rows]
        self.ids, self.states = self.ids[rows], self.states[rows]
        self.start = None if self.start is None else self.start[rows]


# ----------------------------------------------------------------------------------------------------------
# The variants: from the name in GPTConfig to the part


def layernorm(c: GPTConfig) -> nn.Module:
    """(x - mean) / deviation * weight + bias (Ba et al. 2016, arXiv 1607.06450)."""
    return nn.LayerNorm(c.n_embd, c.norm_eps, c.norm_weight, bias=c.bias)


NORMS: dict[str, Callable[[GPTConfig], nn.Module]] = {
    "rmsnorm": lambda c: RMSNorm(c.n_embd, c.norm_eps, c.norm_weight),
    "layernorm": layernorm,
    "none": lambda c: nn.Identity(),
}

GATES = ("swiglu", "geglu")
MLPS: dict[str, Callable[[Tensor], Tensor]] = {
    "swiglu": F.silu,  # gated (Shazeer 2020, arXiv 2002.05202)
    "geglu": F.gelu,  # gated, the same paper
    "gelu": F.gelu,  # Hendrycks & Gimpel 2016, arXiv 1606.08415
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),  # the form that OpenAI's GPT-2 was trained with
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),  # Primer (So et al. 2021, arXiv 2109.08668)
    "silu": F.silu,
    "tanh": torch.tanh,
    "leaky_relu": F.leaky_relu,
}

POSITIONS = ("rope", "learned", "sinusoidal", "shaw", "alibi", "none")
BIASES = ("shaw", "alibi")  # these need the distance between query and key


def sinusoids(position: Tensor, dim: int, theta: float) -> Tensor:
    """Fixed positions (Vaswani et al. 2017, arXiv 1706.03762): (...,) -> (..., dim), sines in even places."""
    cos, sin = rope_table(position, dim + dim % 2, theta)
    return torch.stack((sin, cos), dim=-1).flatten(-2)[..., :dim]


def alibi_slopes(heads: int, device=None) -> Tensor:
    """ALiBi's slope of each head (Press et al. 2021, arXiv 2108.12409): 2^(-8/n) and its powers; (heads,)."""
    n = 2 ** math.floor(math.log2(heads))
    slopes = [2 ** (-8 * (i + 1) / n) for i in range(n)]
    between = [
        2 ** (-8 * (i + 1) / (2 * n)) for i in range(0, 2 * n, 2)
    ]  # the paper's rule for the heads past n
    return torch.tensor(slopes + between[: heads - n], device=device)


class ShawAttention(Attention):
    """
    Relative positions after Shaw et al. 2018 (arXiv 1803.02155): a learned vector for each distance j - i,
    clipped to +-shaw_clip and shared by the heads, is added to the key (with shaw_values to the value too).
    Query times distance is one (B, heads, T, 2 shaw_clip + 1) product, gathered into a bias; there is no
    (T, T, head_dim) tensor.
    """

    def __init__(self, c: GPTConfig):
        super().__init__(c)
        self.clip = c.shaw_clip
        self.key_distance = nn.Embedding(2 * c.shaw_clip + 1, c.head_dim)
        self.value_distance = nn.Embedding(2 * c.shaw_clip + 1, c.head_dim) if c.shaw_values else None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, place: Place) -> Tensor:
        scale = self.head_dim**-0.5
        bucket = (-place.distance).clamp(-self.clip, self.clip) + self.clip  # (T, S)
        bucket = bucket.expand(*q.shape[:2], *bucket.shape)  # (B, heads, T, S)
        bias = place.bias + (q @ self.key_distance.weight.t() * scale).gather(-1, bucket)
        if self.value_distance is None:
            return self.sdpa(q, k, v, bias, causal=False)
        k, v = (x.repeat_interleave(self.heads // self.kv_heads, dim=1) for x in (k, v))
        weight = (q @ k.transpose(-1, -2) * scale + bias).softmax(dim=-1)
        weight = F.dropout(weight, self.dropout, self.training)
        by_distance = torch.zeros(*q.shape[:3], 2 * self.clip + 1, device=q.device, dtype=weight.dtype)
        by_distance = by_distance.scatter_add(-1, bucket, weight)  # in float32: many small ones add up
        return weight.to(v.dtype) @ v + by_distance.to(v.dtype) @ self.value_distance.weight


ATTENTIONS = {"shaw": ShawAttention}  # by position; the others use Attention


class Copies(NamedTuple):
    """A pointer's scores for what comes next, in float32 or more."""

    sentinel: Tensor  # () of a word of the vocabulary
    score: Tensor  # (B, T, S) of saying ids[:, s] again
    ids: Tensor  # (B, S)

    def of(self, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """
        For targets (B, T): the logarithms (B * T,) of what the pointer leaves to the vocabulary and of what
        it gives to them; and its own loss, the mean of -log of what they get out of its share, 0 where they
        cannot be copied. The mixture alone teaches it what it nearly knows: where a weight is close to 0, so
        is the gradient.
        """
        found = self.ids[:, None] == targets[:, :, None]
        total = self.score.logsumexp(dim=-1).flatten()
        copied = torch.where(found, self.score, NEVER).logsumexp(dim=-1).flatten()
        own = torch.where(copied > NEVER / 2, total - copied, 0).sum() / (targets >= 0).sum().clamp(min=1)
        log_z = torch.logaddexp(total, self.sentinel)
        return self.sentinel - log_z, copied - log_z, own

    def mix(self, logits: Tensor) -> Tensor:
        """Log-probabilities from logits (B, T', vocab_size) of the last T' positions."""
        score = self.score[:, -logits.shape[1] :]
        log_z = torch.logaddexp(score.logsumexp(dim=-1, keepdim=True), self.sentinel)
        tiny, copied = torch.finfo(score.dtype).tiny, torch.zeros_like(logits, dtype=score.dtype)
        copied = copied.scatter_add(-1, self.ids[:, None].expand(score.shape), (score - log_z).exp())
        new = F.log_softmax(logits.to(score.dtype), -1) + self.sentinel - log_z
        return torch.logaddexp(new, copied.clamp(min=tiny).log())


NEVER = -1e9  # a logarithm that no exp survives, yet finite: the gradient of a row of -inf is nan


class Pointer(nn.Module):
    """
    A pointer sentinel mixture (Merity et al. 2016, arXiv 1609.07843) over the states of the core (as in
    Grave et al. 2016, arXiv 1612.04426): position t may say again a token s + 1 that it has seen, by what the
    core made of the position before that token, which had to choose it, and of the token's own.

        P(v) = (exp(sentinel) softmax(logits)[v] + sum over s < t, idx[s + 1] = v, of exp(q[t] . k[s])) / Z
        k[s] = norm(a[s] + b[s + 1])

    Names and things come back in a story; attention learns to copy them much later.
    """

    def __init__(self, c: GPTConfig):
        super().__init__()
        self.norm = RMSNorm(c.n_embd, c.norm_eps, False)
        self.qab = nn.Linear(c.n_embd, 3 * c.n_embd, bias=False)
        self.scale = nn.Parameter(torch.ones(()))
        self.sentinel = nn.Parameter(torch.tensor(7.0))

    def forward(self, x: Tensor, idx: Tensor, place: Place, cache: "KVCache | None" = None) -> Copies:
        """x (B, T, n_embd) as it leaves the core, and its ids (B, T)."""
        q, ab = self.qab(self.norm(x)).split((x.shape[-1], 2 * x.shape[-1]), dim=-1)
        if cache is not None:
            ab, idx = cache.keep(cache.states, ab), cache.keep(cache.ids, idx[..., None])[..., 0]
        a, b = ab.chunk(2, dim=-1)
        q, k = self.norm(q), self.norm(a + b.roll(-1, dims=1))  # of the last s + 1 there is no use
        seen = place.distance > 0
        if place.bias is not None:
            seen = seen & (place.bias[:, 0] > -torch.inf)
        score = (q * (self.scale * x.shape[-1] ** -0.5).to(q.dtype)) @ k.transpose(-1, -2)  # (B, T, S)
        score = score.to(torch.promote_types(score.dtype, torch.float32)).masked_fill(~seen, NEVER)
        return Copies(self.sentinel.to(score.dtype), score, idx.roll(-1, dims=1))


class LoRA(nn.Module):
    """base(x) + up(down(x)): a linear layer shared by all blocks, a low-rank part not (arXiv 2106.09685)."""

    def __init__(self, base: nn.Linear, rank: int):
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


def share_mlp(blocks: nn.ModuleList, c: GPTConfig) -> nn.ModuleList:
    """One feed-forward for all layers (MobiLlama, arXiv 2402.16840); norms and attention are not shared."""
    for block in blocks:
        block.mlp = blocks[0].mlp
    return blocks


def share_layers(blocks: nn.ModuleList, c: GPTConfig) -> nn.ModuleList:
    """One block, applied n_layer times (ALBERT, arXiv 1909.11942)."""
    return nn.ModuleList([blocks[0]] * len(blocks))


def share_lora(blocks: nn.ModuleList, c: GPTConfig) -> nn.ModuleList:
    """All matrices shared, each layer with norms and a low-rank part of its own (arXiv 2410.20672)."""
    shared = {name: part for name, part in blocks[0].named_modules() if isinstance(part, nn.Linear)}
    for block in blocks:
        for name, base in shared.items():
            block.set_submodule(name, LoRA(base, c.lora_rank))
    return blocks


SHARES: dict[str, Callable[[nn.ModuleList, GPTConfig], nn.ModuleList]] = {
    "none": lambda blocks, c: blocks, "mlp": share_mlp, "layers": share_layers, "lora": share_lora
}  # fmt: skip


def gpt2_std(c: GPTConfig, name: str, fan_in: int) -> float:
    """Radford et al. 2019: 0.02, divided by sqrt(2 n_layer) for layers that write to the residual stream."""
    return 0.02 / math.sqrt(2 * c.n_layer) if name.endswith("proj") else 0.02


def zero_std(c: GPTConfig, name: str, fan_in: int) -> float:
    """Outputs of blocks and an untied head start at 0: a block starts as the identity (arXiv 1901.09321)."""
    return 0.0 if name.endswith("proj") or name == "head.linear" else fan_in_std(c, name, fan_in)


def fan_in_std(c: GPTConfig, name: str, fan_in: int) -> float:
    """N(0, 1 / fan_in), which keeps the variance (LeCun et al. 1998); embeddings and head N(0, 0.02)."""
    return 0.02 if name.startswith(("embedder", "head")) else fan_in**-0.5


INITS: dict[str, Callable[[GPTConfig, str, int], float]] = {
    "gpt2": gpt2_std,
    "zero": zero_std,
    "fan_in": fan_in_std,
}


@torch.no_grad()
def start_from_pairs(model: GPT, ids: Tensor, prior: float = 20.0) -> None:
    """
    Set embedding and head so that the model begins as the best bigram model of rank n_embd - 1 of the text
    `ids` (N,) int64, rather than as one that knows nothing: for blocks that start as the identity
    (init="zero") and a head that is not tied.

    With n(a, b) the count of b after a, n(b) that of b and P(b) = n(b) / N, and `prior` counts spread as P,
    log P(b | a) = log P(b) + log(1 + n(a, b) / (prior P(b))) + something of a alone, which a softmax does
    not see. The middle term is 0 for pairs that never came, so its factors are those of a sparse matrix.
    """
    c = model.config
    V, rank, device = c.padded_vocab, c.n_embd - 1, ids.device
    pairs, n = torch.unique(ids[:-1] * V + ids[1:], return_counts=True)
    a, b = pairs // V, pairs % V
    count = torch.bincount(ids, minlength=V).float() + 0.5
    p = count / count.sum()
    weight = count.sqrt()  # frequent tokens matter more: least squares over the text, not over the vocabulary
    value = torch.log1p(n / (prior * p[b])) * weight[a]
    table = torch.sparse_coo_tensor(
        torch.stack((a, b)), value, (V, V), check_invariants=False
    ).coalesce()  # weight * term
    generator = torch.Generator(device).manual_seed(0)
    q = torch.randn(V, min(V, rank + 8), generator=generator, device=device)
    for _ in range(3):  # randomized subspace iteration (Halko et al. 2011, arXiv 0909.4061)
        q = torch.linalg.qr(table.t() @ torch.linalg.qr(table @ q).Q).Q
    u, s, _ = torch.linalg.svd(table @ q, full_matrices=False)
    e = u[:, :rank] * s[:rank] / weight[:, None]
    e = torch.cat((e, 0.3 * e.norm(dim=1).median().expand(V, 1)), dim=1)  # the last one carries log P(b)
    e = F.pad(F.normalize(e), (0, c.n_embd - e.shape[1])) * c.n_embd**0.5  # as a norm sees it
    # the head by least squares: e @ h = log P(b) + the middle term, in the mean over the text
    left = e * weight[:, None]
    right = left.t() @ table + (left.t() @ weight)[:, None] * p.log()
    gram = left.t() @ left
    gram.diagonal().add_(1e-3 * gram.diagonal().mean())
    h = torch.linalg.solve(gram, right)
    turn = torch.linalg.qr(torch.randn(c.n_embd, c.n_embd, generator=generator, device=device)).Q
    model.embedder.tokens.weight.copy_(e @ turn)  # no dimension is special
    model.head.linear.weight.copy_((turn.t() @ h).t())


def init_weights(model: GPT, given: list[nn.Module]) -> None:
    """
    Draw matrices from N(0, std^2), std by config.init; biases 0; norms keep 1 and 0; LoRA starts at 0. Parts
    that were given to the model keep what they have.
    """
    c, done = model.config, {id(p) for part in given for p in part.parameters()}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear | nn.Embedding) or id(module.weight) in done:
            continue
        done.add(id(module.weight))  # a tied head comes after the embedding
        name = name.removesuffix(".base")
        std = 0.0 if name.endswith(".up") else INITS[c.init](c, name, module.weight.shape[-1])
        nn.init.normal_(module.weight, std=std)
        if getattr(module, "bias", None) is not None:
            nn.init.zeros_(module.bias)
