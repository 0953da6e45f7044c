"""
Bytes in patches: a transformer over words inside a language model of bytes, after SpaceByte (Slagle 2024,
arXiv 2404.14408), with hashed byte n-grams (Byte Latent Transformer, Pagnoni et al. 2024, arXiv 2412.09871).

    bytes -> embedding + n-grams -> encoder: local layers -> one vector for each patch -> core over patches
          -> each byte takes its last finished patch -> decoder: local layers -> logits of the next byte

A patch ends at a byte that is neither a letter or digit nor inside a character, if the byte before it is one:
at the space after a word. Where patches end depends on earlier bytes only, and the state of a patch reaches
only the bytes from its end on, so the likelihood is exact for any bytes. A row has as many patches as it
needs. boundary="byte" makes each byte a patch, without local layers: a plain GPT with the same n-grams.

Result: after 240 seconds on two CPU cores 1.162 bits per byte on TinyStories, where the plain GPT has 1.230,
with 0.6 of its operations per byte (README.md).
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from experiments.byte_parts import EOT, Cache, NGrams, Store, local_kernel, pad_right
from model import AttnInputs, Core, GPTConfig, Head, RMSNorm, attn_inputs, check_settings
from nanostlm.variants import zero_std


@dataclass(frozen=True)
class Config:
    block_size: int = 512  # context length in bytes
    n_layer: int = 4  # layers of the core, over patches
    n_head: int = 2  # attention heads of the core
    n_embd: int = 128  # width of the core
    boundary: str = "space"  # space (SpaceByte's rule) | stride | byte (no patches: a plain GPT)
    stride: int = 6  # boundary=stride: bytes in a patch
    pooling: str = "last"  # a patch's vector, from its bytes' states: last | mean | max | attention
    encoder_layers: int = 0  # local layers before the core
    decoder_layers: int = 2  # local layers after it
    local_head: int = 2  # attention heads of the local layers
    local_embd: int = 128  # width of the local layers
    local_window: int = 16  # a byte attends to this many bytes in the local layers, itself included
    ngram: int = 8  # n-grams of 2 to this many bytes are hashed and embedded; 1 = none
    ngram_rows: int = 8192  # rows of each table of n-grams
    ngram_width: int = 32  # width of each table
    dropout: float = 0.0  # as in GPT, in all layers
    vocab_size: int = 257  # 256 bytes and end-of-text; train.py takes it from the tokenizer
    loss_chunk: int = 256  # tokens per chunk of the loss; 0 = all at once, and the logits are returned too

    @property
    def width(self) -> int:
        """Of the states of bytes."""
        return self.n_embd if self.boundary == "byte" else self.local_embd

    @property
    def patch_bytes(self) -> float:
        """Bytes in a patch, on average; with boundary=space, in TinyStories."""
        return {"space": 5.0, "stride": float(self.stride), "byte": 1.0}[self.boundary]

    def parts(self) -> tuple[GPTConfig, GPTConfig, GPTConfig]:
        """The configurations of encoder, core and decoder."""
        same = {name: getattr(self, name) for name in ("block_size", "vocab_size", "dropout", "loss_chunk")}
        same |= dict(qk_norm=True, norm_weight=False, embed_norm=True, tied=False)
        core = GPTConfig(n_layer=self.n_layer, n_head=self.n_head, n_embd=self.n_embd, **same)
        if self.boundary == "byte":
            return replace(core, n_layer=0), core, replace(core, n_layer=0)
        local = GPTConfig(n_head=self.local_head, n_embd=self.local_embd, **same)
        return replace(local, n_layer=self.encoder_layers), core, replace(local, n_layer=self.decoder_layers)

    def validate(self) -> None:
        check_settings(self, RANGES, CHOICES)
        for part in self.parts():
            replace(part, n_layer=max(1, part.n_layer)).validate()
        if self.vocab_size != EOT + 1:
            found = f"patches consist of bytes, not of {self.vocab_size} ids"
            raise ValueError(f"{found}: set tokenizer=byte, and leave out objective=fim, which adds ids")

    def estimate(self) -> dict[str, int]:
        """As in GPTConfig, per byte."""
        encoder, core, decoder = (c.estimate() for c in self.parts())
        layers = [x["parameters"] - x["embedding_parameters"] for x in (encoder, core, decoder)]
        tables, C, P = self.ngram - 1, self.width, self.patch_bytes
        mix, between = tables * self.ngram_width * C, 2 * C * self.n_embd * (self.boundary != "byte")
        head = self.parts()[0].padded_vocab * C
        embedding = (EOT + 1) * C + tables * self.ngram_rows * self.ngram_width + head
        local = 12 * min(self.local_window, self.block_size) * C * (self.encoder_layers + self.decoder_layers)
        attention = (
            12 * self.block_size / P * self.n_embd * self.n_layer + local * (self.boundary != "byte") * P
        )
        flops = 6 * (layers[0] + layers[2] + mix + head) + (6 * (layers[1] + between) + attention) / P
        pooled = (self.pooling == "attention") * C
        activations = [x["activations_per_token"] for x in (encoder, core, decoder)]
        return {
            "parameters": sum(layers) + mix + between + embedding + pooled,
            "embedding_parameters": embedding,
            "flops_per_token": round(flops),
            "activations_per_token": round(activations[0] + activations[1] / P + activations[2] + 6 * C),
        }

    def memory(self, tokens: int, itemsize: int) -> int:
        """As in GPTConfig."""
        counts, logits = self.estimate(), (min(self.loss_chunk, tokens) or tokens) * (EOT + 64)
        states = 16 + 2 * itemsize * (itemsize < 4)
        per_token = (itemsize + 2) * counts["activations_per_token"]
        return states * counts["parameters"] + per_token * tokens + (8 + itemsize) * logits


RANGES = {
    **dict.fromkeys(("block_size", "n_layer", "n_head", "n_embd", "stride"), (1, 10**9)),
    **dict.fromkeys(("local_head", "local_embd", "local_window", "ngram_rows", "ngram_width"), (1, 10**9)),
    **dict.fromkeys(("encoder_layers", "decoder_layers"), (0, 10**4)),
    "ngram": (1, 16),
    "dropout": (0, 0.999),
}
CHOICES = {"boundary": ("space", "stride", "byte"), "pooling": ("last", "mean", "max", "attention")}

# ----------------------------------------------------------------------------------------------------------
# Parts


def patch_ends(c: Config, idx: Tensor, before: Tensor, positions: Tensor) -> Tensor:
    """Whether a patch ends with each id of idx (B, T), after `before` (B, T), at these positions: bool."""
    if c.boundary == "stride":
        return (positions % c.stride == 0).expand(idx.shape)
    return (spacelike(idx) & ~spacelike(before)) | (idx == EOT) | (positions == 0)


def spacelike(idx: Tensor) -> Tensor:
    """Neither [0-9A-Za-z] nor a byte inside a UTF-8 character."""
    inside = torch.zeros_like(idx, dtype=torch.bool)
    for first, last in ("09", "AZ", "az", "\x80\xbf"):
        inside |= (idx >= ord(first)) & (idx <= ord(last))
    return ~inside


class Pool(nn.Module):
    """
    The vector of a patch from the states of its bytes: the last one, the largest of each dimension, or their
    mean, with equal or learned weights.
    """

    def __init__(self, c: Config):
        super().__init__()
        self.kind = c.pooling
        self.score = nn.Linear(c.width, 1, bias=False) if c.pooling == "attention" else None

    def weights(self, x: Tensor) -> Tensor:
        """(..., width) -> (..., 1). The scores of attention are bounded, so their exp needs no maximum."""
        if self.score is None:
            return torch.ones_like(x[..., :1])
        return (8 * torch.tanh(self.score(x).to(x.dtype) / 8)).exp()

    def forward(self, x: Tensor, ends: Tensor, at: Tensor) -> Tensor:
        """States (B, T, width), ends of patches (B, T) and where these are (B, P) -> (B, P, width)."""
        (B, T, C), P = x.shape, at.shape[1]
        rows = torch.arange(B, device=x.device)[:, None]
        if self.kind == "last":
            return x.flatten(0, 1).index_select(0, (at + rows * T).flatten()).view(B, P, C)
        patch = (ends.cumsum(dim=1) - ends.long() + rows * (P + 1)).flatten()  # P: not finished
        if self.kind == "max":
            low = x.new_full((B * (P + 1), C), -torch.inf)
            largest = low.scatter_reduce(0, patch[:, None].expand(-1, C), x.flatten(0, 1), "amax")
            return self.vector(largest.view(B, P + 1, C)[:, :-1], largest)
        weight = self.weights(x)
        parts = torch.cat((x * weight, weight), dim=-1).flatten(0, 1)
        sums = parts.new_zeros(B * (P + 1), C + 1).index_add(0, patch, parts).view(B, P + 1, C + 1)[:, :-1]
        return self.vector(sums[..., :-1], sums[..., -1:])

    def vector(self, value: Tensor, weight: Tensor) -> Tensor:
        """Of patches with this sum and sum of weights, or maximum, or last state. 0 where a row has none."""
        if self.kind == "max":
            return value.masked_fill(value == -torch.inf, 0)
        return value if self.kind == "last" else value / weight.clamp(min=1e-9)

    def running(self, x: Tensor, mask: Tensor, value: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """What `vector` takes, from that of earlier bytes and the bytes of x (B, T, width) in mask (B, T)."""
        if self.kind == "last":
            return x[:, -1].clone(), weight
        if self.kind == "max":
            return torch.maximum(value, x.masked_fill(~mask[..., None], -torch.inf).amax(dim=1)), weight
        w = self.weights(x) * mask[..., None]
        return value + (w * x).sum(dim=1), weight + w.sum(dim=1)

    def nothing(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The running value and weight of no bytes, for states like x (B, width)."""
        return torch.full_like(x, -torch.inf if self.kind == "max" else 0), torch.zeros_like(x[:, :1])


# ----------------------------------------------------------------------------------------------------------
# The model


class Model(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        config.validate()
        self.config = c = config
        self.parts = c.parts()
        self.embedder = NGrams(c)
        self.encoder, self.core, self.decoder = map(Core, self.parts)
        self.patched = c.boundary != "byte"
        if self.patched:
            self.pool = Pool(c)
            self.down, self.up = (
                nn.Linear(c.width, c.n_embd, bias=False),
                nn.Linear(c.n_embd, c.width, bias=False),
            )
            self.norm = RMSNorm(c.n_embd, 1e-5, False)
        self.head = Head(self.parts[0])
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=zero_std(self.parts[1], name, module.weight.shape[-1]))

    def forward(self, idx, targets=None, cache=None, segments=None, last=False):
        """
        idx (B, T) -> (logits (B, T, vocab_size), None); with targets -> (None, mean loss in nats). With a new
        cache, segments (B, T) is 0 for padding, which is on the left.
        """
        if cache is not None and cache.started:
            x = self.step(idx, cache)
        else:
            x = self.states(idx, cache, segments)
        if targets is not None:
            return self.head.loss(x, targets)
        return self.head(x[:, -1:] if last else x), None

    def states(self, idx: Tensor, cache: "Cache | None", segments: Tensor | None) -> Tensor:
        """The states of the bytes, (B, T, width); with segments, those of the last bytes, (B, 1, width)."""
        idx, lengths = pad_right(idx, segments)
        (B, T), rows = idx.shape, torch.arange(len(idx), device=idx.device)
        steps = torch.arange(T, device=idx.device)
        before = idx.new_full((B, max(1, self.embedder.before)), EOT)
        encoder, core, decoder = (None, None, None) if cache is None else cache.stores
        x = self.embedder(idx, before)
        if not self.patched:
            x = self.core(x, attn_inputs(self.parts[1], idx)[1], core)
        else:
            ends = patch_ends(self.config, idx, torch.cat((before[:, -1:], idx[:, :-1]), dim=1), steps)
            ends = ends & (steps < lengths[:, None])
            counts, patch = ends.sum(dim=1), ends.cumsum(dim=1) - 1  # (B,), (B, T): the last finished one
            at = idx.new_zeros(B, int(counts.max()))
            row, where = ends.nonzero(as_tuple=True)
            at[row, patch[row, where]] = where
            local = attn_inputs(self.parts[0], idx)[1]._replace(kernel=local_kernel(self.config.local_window))
            x = self.encoder(x, local, encoder)
            held = self.through_core(self.pool(x, ends, at), attn_inputs(self.parts[1], at)[1], core)
            if cache is not None:
                unfinished = (steps > at.gather(1, counts[:, None] - 1)) & (steps < lengths[:, None])
                value, weight = self.pool.running(x, unfinished, *self.pool.nothing(x[:, 0]))
                cache.rows = {"held": held[rows, counts - 1], "value": value, "weight": weight}
                core.fill(counts)
            flat = (patch + rows[:, None] * held.shape[1]).flatten()
            x = self.decoder(x + held.flatten(0, 1).index_select(0, flat).view(x.shape), local, decoder)
        if cache is not None:
            cache.begin(idx, before, lengths)
        return x if segments is None else x[rows, lengths - 1][:, None]

    def through_core(self, vectors: Tensor, attn: AttnInputs, cache: "Store | None" = None) -> Tensor:
        """Vectors of patches (B, P, width) -> what their bytes and those after them add, (B, P, width)."""
        return self.up(self.norm(self.core(self.down(vectors), attn, cache)))

    def step(self, idx: Tensor, cache: "Cache") -> Tensor:
        """The states of one more byte in each row, (B, 1, width)."""
        if idx.shape[1] != 1:
            raise ValueError(
                f"a cache takes the prompt in one pass, then one byte at a time, not {idx.shape[1]}"
            )
        (encoder, core, decoder), state = cache.stores, cache.rows
        every = torch.arange(len(idx), device=idx.device)
        x = self.embedder(idx, state["before"])
        if not self.patched:
            x = self.core(x, core.attend(every, self.parts[1]), core)
        else:
            x = self.encoder(x, encoder.attend(every, self.parts[0]), encoder)
            ends = patch_ends(self.config, idx, state["before"][:, -1:], state["length"][:, None])
            value, weight = self.pool.running(x, torch.ones_like(ends), state["value"], state["weight"])
            if len(rows := ends[:, 0].nonzero()[:, 0]):
                vectors = self.pool.vector(value[rows], weight[rows])[:, None]
                state["held"][rows] = self.through_core(vectors, core.attend(rows, self.parts[1]), core)[:, 0]
                value[rows], weight[rows] = self.pool.nothing(value[rows])
            state |= {"value": value, "weight": weight}
            x = self.decoder(x + state["held"][:, None], decoder.attend(every, self.parts[2]), decoder)
        cache.advance(idx)
        return x

    def new_cache(self, rows: int) -> "Cache":
        c = self.config
        return Cache(Store(c.local_window), Store(c.block_size), Store(c.local_window))
