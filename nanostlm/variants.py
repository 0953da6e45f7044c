"""
Optional components of the model, selected by name. model.py imports this module when one does.

    position    alibi, sinusoidal, shaw      biases or embeddings instead of RoPE
    share       mlp, layers, lora            weights that all layers share
    init        zero, fan_in                 standard deviations of the initial weights
    pointer     True                         a head that can copy tokens from the context

bigram_init(model, ids) sets embedding and head of a new model to a bigram model of the text `ids`.
"""

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import (
    GPT,
    Attention,
    AttnInputs,
    GPTConfig,
    RMSNorm,
    chunked_cross_entropy,
    cross_entropy,
    gpt2_std,
    rope_table,
)

# ----------------------------------------------------------------------------------------------------------
# Positions


def sinusoids(positions: Tensor, dim: int, theta: float) -> Tensor:
    """Fixed embeddings (Vaswani et al. 2017, arXiv 1706.03762): (...,) -> (..., dim), sines at even i."""
    cos, sin = rope_table(positions, dim + dim % 2, theta)
    return torch.stack((sin, cos), dim=-1).flatten(-2)[..., :dim]


class Sinusoids(nn.Module):
    """Positions (T,) or (B, T) -> their sinusoids (..., n_embd), in place of a learned embedding."""

    def __init__(self, c: GPTConfig):
        super().__init__()
        self.dim, self.theta = c.n_embd, c.rope_theta

    def forward(self, positions: Tensor) -> Tensor:
        return sinusoids(positions, self.dim, self.theta)


def alibi_slopes(heads: int, device=None) -> Tensor:
    """ALiBi's slope of each head (Press et al. 2021, arXiv 2108.12409): 2^(-8/n) and its powers; (heads,)."""
    n = 2 ** math.floor(math.log2(heads))
    slopes = [2 ** (-8 * (i + 1) / n) for i in range(n)]
    slopes += [
        2 ** (-8 * (i + 1) / (2 * n)) for i in range(0, 2 * n, 2)
    ]  # the paper's rule when n_head is not a power of 2
    return torch.tensor(slopes[:heads], device=device)


def alibi(heads: int, distance: Tensor) -> Tensor:
    """ALiBi's bias on the attention scores: (T, S) -> (heads, T, S)."""
    return -(alibi_slopes(heads, distance.device)[:, None, None] * distance.abs())


class ShawAttention(Attention):
    """
    Relative positions after Shaw et al. 2018 (arXiv 1803.02155): a learned vector for each distance j - i,
    clipped to +-shaw_clip and shared by the heads, is added to the key (with shaw_values to the value too).
    Query times distance is one (B, n_head, T, 2 shaw_clip + 1) product, gathered into a bias; no tensor of
    size (T, T, head_dim) is made.
    """

    def __init__(self, c: GPTConfig):
        super().__init__(c)
        self.clip = c.shaw_clip
        self.key_distance = nn.Embedding(2 * c.shaw_clip + 1, c.head_dim)
        self.value_distance = nn.Embedding(2 * c.shaw_clip + 1, c.head_dim) if c.shaw_values else None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, attn: AttnInputs) -> Tensor:
        scale = self.head_dim**-0.5
        bucket = (-attn.distance).clamp(-self.clip, self.clip) + self.clip  # (T, S)
        bucket = bucket.expand(*q.shape[:2], *bucket.shape)  # (B, n_head, T, S)
        bias = attn.attn_mask + (q @ self.key_distance.weight.t() * scale).gather(-1, bucket)
        if self.value_distance is None:
            return super().attend(q, k, v, attn._replace(attn_mask=bias, is_causal=False))
        k, v = (x.repeat_interleave(self.n_head // self.n_kv_head, dim=1) for x in (k, v))
        probs = (q @ k.transpose(-1, -2) * scale + bias).softmax(dim=-1)
        probs = F.dropout(probs, self.dropout, self.training)
        by_distance = torch.zeros(*q.shape[:3], 2 * self.clip + 1, device=q.device, dtype=probs.dtype)
        by_distance = by_distance.scatter_add(-1, bucket, probs)  # in float32: a sum of many small numbers
        return probs.to(v.dtype) @ v + by_distance.to(v.dtype) @ self.value_distance.weight


def flex_attention(c: GPTConfig, starts: Tensor) -> Callable[..., Tensor]:
    """
    A kernel for document masking on CUDA, called like model.sdpa: FlexAttention (Dong et al. 2024, arXiv
    2412.05496) skips the blocks of keys that no query sees, where a dense mask would rule out fast kernels.
    starts (B, T): where the document of each token starts.
    """
    from torch.nn.attention import flex_attention as flex

    B, T = starts.shape
    window = c.window or T

    def visible(b, h, q, k):
        near = (k <= q) & (q - k < window) if c.causal else (q - k).abs() < window
        return near & (starts[b, q] == starts[b, k])

    mask = flex.create_block_mask(visible, B, None, T, T, device=starts.device)

    def kernel(q, k, v, attn_mask=None, is_causal=False, dropout=0.0):
        q, k, v = (x.contiguous() for x in (q, k, v))  # of views, PyTorch 2.13 compiles wrong code on a CPU
        return flex.flex_attention(q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1])

    return kernel


# ----------------------------------------------------------------------------------------------------------
# Weight sharing: a list of blocks -> the same list, with shared parts


class LoRA(nn.Module):
    """base(x) + up(down(x)), a linear layer and a low-rank part (Hu et al. 2021, arXiv 2106.09685)."""

    def __init__(self, base: nn.Linear, rank: int):
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


def replace_linear(model: nn.Module, replacement: Callable[[nn.Linear], nn.Module]) -> None:
    """Replace plain linear layers by replacement(layer). A layer shared by several blocks stays shared."""
    replaced: dict[nn.Module, nn.Module] = {}
    for name, layer in list(model.named_modules(remove_duplicate=False)):
        if type(layer) is nn.Linear:
            if layer not in replaced:
                replaced[layer] = replacement(layer).train(layer.training)
            model.set_submodule(name, replaced[layer])


def merge_lora(state: dict[str, Tensor], wanted: Iterable[str]) -> dict[str, Tensor]:
    """A state_dict in which base + up @ down replaces each LoRA of `state` that is one layer in `wanted`."""
    state = dict(state)
    for name in wanted:
        layer, _, leaf = name.rpartition(".")
        if name not in state and f"{layer}.base.{leaf}" in state:
            state[name] = state.pop(f"{layer}.base.{leaf}")
            if leaf == "weight":
                up, down = (state.pop(f"{layer}.{part}.weight") for part in ("up", "down"))
                state[name] = state[name] + up @ down
    return state


def share_mlp(blocks: nn.ModuleList, c: GPTConfig) -> nn.ModuleList:
    """One MLP for all layers (MobiLlama, arXiv 2402.16840); norms and attention are not shared."""
    for block in blocks:
        block.mlp = blocks[0].mlp
    return blocks


def share_layers(blocks: nn.ModuleList, c: GPTConfig) -> nn.ModuleList:
    """One block, applied n_layer times (ALBERT, arXiv 1909.11942)."""
    return nn.ModuleList([blocks[0]] * len(blocks))


def share_lora(blocks: nn.ModuleList, c: GPTConfig) -> nn.ModuleList:
    """All matrices shared; each layer has its own norms and a low-rank part (arXiv 2410.20672)."""
    shared = {name: part for name, part in blocks[0].named_modules() if isinstance(part, nn.Linear)}
    for block in blocks:
        for name, base in shared.items():
            block.set_submodule(name, LoRA(base, c.lora_rank))
    return blocks


SHARES: dict[str, Callable[[nn.ModuleList, GPTConfig], nn.ModuleList]] = {
    "mlp": share_mlp,
    "layers": share_layers,
    "lora": share_lora,
}


# ----------------------------------------------------------------------------------------------------------
# Initialization


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


def init_std(c: GPTConfig, name: str, fan_in: int) -> float:
    """Standard deviation of a matrix by its module's name; the low-rank parts of LoRA start at 0."""
    return 0.0 if name.endswith(".up") else INITS[c.init](c, name.removesuffix(".base"), fan_in)


@torch.no_grad()
def bigram_init(model: GPT, ids: Tensor, prior: float = 20.0) -> None:
    """
    Set embedding and head so that the model starts as the best bigram model of rank n_embd - 1 of the text
    `ids` (N,) int64. The blocks must start as the identity (init="zero"), and the head must not be tied.

    With n(a, b) the count of b after a, n(b) that of b, P(b) = n(b) / N, and `prior` additional counts
    distributed as P, log P(b | a) = log P(b) + log(1 + n(a, b) / (prior P(b))) + a term of a alone, which a
    softmax ignores. The middle term is 0 for pairs that never occur, so it is a sparse matrix.
    """
    c = model.config
    if c.tied:
        raise ValueError("pair_tokens needs tied=False")
    V, rank, device = c.padded_vocab, c.n_embd - 1, ids.device
    pairs, n = torch.unique(ids[:-1] * V + ids[1:], return_counts=True)
    a, b = pairs // V, pairs % V
    count = torch.bincount(ids, minlength=V).float() + 0.5
    p = count / count.sum()
    weight = count.sqrt()  # least squares over the text, not over the vocabulary: frequent ids matter more
    value = torch.log1p(n / (prior * p[b])) * weight[a]  # weight * middle term
    table = torch.sparse_coo_tensor(torch.stack((a, b)), value, (V, V), check_invariants=False).coalesce()
    generator = torch.Generator(device).manual_seed(0)
    q = torch.randn(V, min(V, rank + 8), generator=generator, device=device)
    for _ in range(3):  # randomized subspace iteration (Halko et al. 2011, arXiv 0909.4061)
        q = torch.linalg.qr(table.t() @ torch.linalg.qr(table @ q).Q).Q
    u, s, _ = torch.linalg.svd(table @ q, full_matrices=False)
    e = u[:, :rank] * s[:rank] / weight[:, None]
    e = torch.cat((e, 0.3 * e.norm(dim=1).median().expand(V, 1)), dim=1)  # the last dimension: log P(b)
    e = F.pad(F.normalize(e), (0, c.n_embd - e.shape[1])) * c.n_embd**0.5  # like the output of the norms
    # the head by least squares: e @ h = log P(b) + the middle term, averaged over the text
    left = e * weight[:, None]
    right = left.t() @ table + (left.t() @ weight)[:, None] * p.log()
    gram = left.t() @ left
    gram.diagonal().add_(1e-3 * gram.diagonal().mean())
    h = torch.linalg.solve(gram, right)
    rotation = torch.linalg.qr(torch.randn(c.n_embd, c.n_embd, generator=generator, device=device)).Q
    model.embedder.tokens.weight.copy_(e @ rotation)  # random rotation, so that all dimensions are alike
    model.head.linear.weight.copy_((rotation.t() @ h).t())


# ----------------------------------------------------------------------------------------------------------
# Pointer


MASKED = -1e9  # its exp is 0; finite, because the gradient of a row of -inf is nan


class Copies(NamedTuple):
    """The pointer's scores for the next token, in float32 or wider."""

    sentinel: Tensor  # (), the score of generating from the vocabulary
    score: Tensor  # (B, T, S), of copying ids[:, s]
    ids: Tensor  # (B, S)
    loss_weight: float  # weight of the auxiliary pointer loss; 0 in evaluation

    def probs(self, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """
        For targets (B, T): log-probabilities (B * T,) of generating from the vocabulary and of copying the
        target; and the pointer's own loss, the mean of -log(probability of the target | copying), 0 where the
        target cannot be copied. The mixture alone gives vanishing gradients to small copy probabilities.
        """
        found = self.ids[:, None] == targets[:, :, None]
        total = self.score.logsumexp(dim=-1).flatten()
        copied = torch.where(found, self.score, MASKED).logsumexp(dim=-1).flatten()
        own = torch.where(copied > MASKED / 2, total - copied, 0).sum() / (targets >= 0).sum().clamp(min=1)
        log_z = torch.logaddexp(total, self.sentinel)
        return self.sentinel - log_z, copied - log_z, own

    def mix(self, logits: Tensor) -> Tensor:
        """Log-probabilities from logits (B, T', vocab_size) of the last T' positions."""
        score = self.score[:, -logits.shape[1] :]
        log_z = torch.logaddexp(score.logsumexp(dim=-1, keepdim=True), self.sentinel)
        top, total = score.detach().amax(dim=-1, keepdim=True), torch.zeros_like(logits, dtype=score.dtype)
        total = total.scatter_add(-1, self.ids[:, None].expand(score.shape), (score - top).exp())
        copied = total.log() + (top - log_z)
        if torch.is_grad_enabled():  # log(0) has no gradient
            copied = torch.where(total > 0, total.clamp(min=1e-38).log() + (top - log_z), -torch.inf)
        generated = F.log_softmax(logits.to(score.dtype), -1) + self.sentinel - log_z
        return torch.logaddexp(generated, copied)

    def slice(self, start: int, stop: int) -> "Copies":
        """Those at the positions from start to before stop."""
        return self._replace(score=self.score[:, start:stop])

    def mixed_with(self, head: nn.Module) -> "Mixture":
        return Mixture(head, self)


class Mixture(NamedTuple):
    """A head that mixes copies with what another head generates; it returns log-probabilities."""

    head: nn.Module
    copies: Copies

    def __call__(self, x: Tensor) -> Tensor:
        return self.copies.mix(self.head(x))

    def loss(self, x: Tensor, targets: Tensor, reduction: str = "mean") -> tuple[Tensor | None, Tensor]:
        head, (generate, copied, own) = self.head, self.copies.probs(targets)
        own = self.copies.loss_weight * own if self.copies.loss_weight else 0.0
        c, linear = getattr(head, "config", None), getattr(head, "linear", None)
        if c is not None and c.loss_chunk and type(linear) is nn.Linear:  # as in Head.loss
            mixture = generate, copied
            loss = chunked_cross_entropy(head.norm(x), linear.weight, targets, c, mixture, reduction)
            return None, loss + own
        logits = self(x)
        loss = cross_entropy(logits, targets, reduction=reduction) + own
        return None if c is not None and c.loss_chunk else logits, loss


class Pointer(nn.Module):
    """
    A pointer sentinel mixture (Merity et al. 2016, arXiv 1609.07843) over the states of the core (as in Grave
    et al. 2016, arXiv 1612.04426): position t can copy a token s + 1 of the context. Its key combines the
    states of the previous position, which predicted the token, and of the token itself.

        P(v) = (exp(sentinel) softmax(logits)[v] + sum over s < t, idx[s + 1] = v, of exp(q[t] . k[s])) / Z
        k[s] = norm(a[s] + b[s + 1])

    Stories repeat names and objects; without a pointer, attention learns to copy them much later.
    """

    def __init__(self, c: GPTConfig):
        super().__init__()
        self.loss_weight = c.pointer_loss
        self.norm = RMSNorm(c.n_embd, c.norm_eps, False)
        self.qab = nn.Linear(c.n_embd, 3 * c.n_embd, bias=False)
        self.scale = nn.Parameter(torch.ones(()))
        self.sentinel = nn.Parameter(torch.tensor(7.0))

    def forward(self, x: Tensor, idx: Tensor, attn: AttnInputs, cache=None) -> Copies:
        """States x (B, T, n_embd) of the core and their ids (B, T)."""
        q, ab = self.qab(self.norm(x)).split((x.shape[-1], 2 * x.shape[-1]), dim=-1)
        if cache is not None:
            ab, idx = cache.update_pointer(ab, idx)
        a, b = ab.chunk(2, dim=-1)
        k = self.norm(a + b.roll(-1, dims=1))  # (B, S, n_embd); the newest token has no s + 1
        q = self.norm(q)
        visible = attn.distance > 0
        if attn.attn_mask is not None:
            visible = visible & (attn.attn_mask[:, 0] > -torch.inf)
        score = (q * (self.scale * x.shape[-1] ** -0.5).to(q.dtype)) @ k.transpose(-1, -2)  # (B, T, S)
        score = score.to(torch.promote_types(score.dtype, torch.float32)).masked_fill(~visible, MASKED)
        loss_weight = self.loss_weight if self.training else 0.0
        return Copies(self.sentinel.to(score.dtype), score, idx.roll(-1, dims=1), loss_weight)
