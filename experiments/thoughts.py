"""
Next thought: a model that reads sentence by sentence. All that it knows of earlier sentences is a few latents
for each. From these it predicts the latents of the next sentence, and from those the sentence, byte by byte.

    bytes -> encoder: attention within the sentence -> latents of the sentence -> causal core over sentences
          -> predicted latents of the next sentence -> decoder: attention within the sentence -> logits

The idea is that of "next thought prediction" in Super Tiny Language Models (arXiv 2405.14159). As in "Let's
Predict Sentence by Sentence" (arXiv 2505.22202), latents learn from the cross-entropy of the next sentence,
end to end, not from reconstruction; so the likelihood is exact. nextlat adds a loss of the predicted latents
themselves (NextLat, arXiv 2511.05963).

A sentence begins with the white space after . ! ? and perhaps a quotation mark, or with end-of-text.

Result: after ten minutes on toystories, 0.304 bits per byte; 0.407 from the sentence alone, 0.288 with all of
the text. What crosses is the plot, not yet names and pronouns (README.md).
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
    n_layer: int = 2  # layers of the core, over sentences
    n_head: int = 4  # attention heads of the core
    n_embd: int = 256  # width of the core
    latents: int = 4  # latents of a sentence
    latent_width: int = 64  # numbers in each
    nextlat: float = 0.0  # weight in training of the distance between predicted and actual latents
    context: str = "latents"  # latents | none (this sentence only) | full (attention to all bytes as well)
    encoder_layers: int = 2  # layers over bytes before the core
    decoder_layers: int = 2  # layers over bytes after it
    local_head: int = 2  # their attention heads
    local_embd: int = 128  # their width
    local_window: int = 128  # a byte attends to this many bytes of its sentence, itself included
    ngram: int = 5  # n-grams of 2 to this many bytes are hashed and embedded; 1 = none
    ngram_rows: int = 8192  # rows of each table of n-grams
    ngram_width: int = 32  # width of each table
    dropout: float = 0.0  # as in GPT, in all layers
    vocab_size: int = 257  # 256 bytes and end-of-text; train.py takes it from the tokenizer
    loss_chunk: int = 256  # tokens per chunk of the loss; 0 = all at once, and the logits are returned too

    @property
    def width(self) -> int:
        return self.local_embd

    @property
    def window(self) -> int:
        return self.block_size if self.context == "full" else self.local_window

    def parts(self) -> tuple[GPTConfig, GPTConfig, GPTConfig]:
        """The configurations of encoder, core and decoder."""
        same = {name: getattr(self, name) for name in ("block_size", "vocab_size", "dropout", "loss_chunk")}
        same |= dict(qk_norm=True, norm_weight=False, tied=False)
        core = GPTConfig(n_layer=self.n_layer, n_head=self.n_head, n_embd=self.n_embd, **same)
        local = GPTConfig(n_head=self.local_head, n_embd=self.local_embd, **same)
        return replace(local, n_layer=self.encoder_layers), core, replace(local, n_layer=self.decoder_layers)

    def validate(self) -> None:
        check_settings(self, RANGES, {"context": ("latents", "none", "full")})
        for part in self.parts():
            part.validate()
        if self.vocab_size != EOT + 1:
            found = f"sentences consist of bytes, not of {self.vocab_size} ids"
            raise ValueError(f"{found}: set tokenizer=byte, and leave out objective=fim, which adds ids")

    def estimate(self) -> dict[str, int]:
        """As in GPTConfig, per byte, with a sentence for every 45 bytes, as in TinyStories."""
        encoder, core, decoder = (c.estimate() for c in self.parts())
        layers = [x["parameters"] - x["embedding_parameters"] for x in (encoder, core, decoder)]
        activations = [x["activations_per_token"] for x in (encoder, core, decoder)]
        tables, C, size = self.ngram - 1, self.width, self.latents * self.latent_width
        head, mix, score = self.parts()[0].padded_vocab * C, tables * self.ngram_width * C, self.latents * C
        of_sentence = layers[1] + score * size + 2 * size * self.n_embd + self.decoder_layers * size * C
        embedding = (EOT + 1) * C + tables * self.ngram_rows * self.ngram_width + head
        attention = 12 * self.window * C * (self.encoder_layers + self.decoder_layers)
        attention += 12 * self.block_size / 45 * self.n_embd * self.n_layer / 45
        local = layers[0] + layers[2] + mix + score
        return {
            "parameters": local + of_sentence + size + embedding,
            "embedding_parameters": embedding,
            "flops_per_token": round(6 * (local + head + of_sentence / 45) + attention),
            "activations_per_token": round(activations[0] + activations[1] / 45 + activations[2] + 6 * C),
        }


RANGES = {
    **dict.fromkeys(("block_size", "n_layer", "n_head", "n_embd", "latents", "latent_width"), (1, 10**9)),
    **dict.fromkeys(("local_head", "local_embd", "local_window", "ngram_rows", "ngram_width"), (1, 10**9)),
    **dict.fromkeys(("encoder_layers", "decoder_layers"), (1, 10**4)),
    "ngram": (1, 16),
    "dropout": (0, 0.999),
}


def sentence_starts(idx: Tensor, before: Tensor) -> Tensor:
    """Whether each id of idx (B, T), after the two or more ids `before` (B, n), begins a sentence: bool."""
    ids = torch.cat((before[:, -2:], idx), dim=1)
    kinds = ((ids, b".!?"), (ids, b"\"'"), (idx, b" \n\t\r"))
    stop, last, space = (torch.isin(x, torch.tensor(list(text), device=x.device)) for x, text in kinds)
    return space & (stop[:, 1:-1] | last[:, 1:-1] & stop[:, :-2]) | (idx == EOT)


class Pool(nn.Module):
    """The latents of a sentence: weighted means of its bytes' states, mixed and normalized."""

    def __init__(self, c: Config):
        super().__init__()
        self.shape = c.latents, c.latent_width
        self.score = nn.Linear(c.width, c.latents, bias=False)
        self.mix = nn.Linear(c.latents * c.width, c.latents * c.latent_width, bias=False)
        self.norm = RMSNorm(c.latent_width, 1e-5, False)

    def terms(self, x: Tensor) -> Tensor:
        """States (..., width) -> terms of the sums over a sentence, (..., latents, width + 1)."""
        weight = (8 * torch.tanh(self.score(x).to(x.dtype) / 8)).exp()[..., None]
        return torch.cat((x[..., None, :] * weight, weight), dim=-1)

    def forward(self, sums: Tensor) -> Tensor:
        """Sums of `terms` -> latents (..., latents * latent_width)."""
        z = self.mix((sums[..., :-1] / sums[..., -1:].clamp(min=1e-9)).flatten(-2))
        return self.norm(z.unflatten(-1, self.shape)).flatten(-2)


class Model(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        config.validate()
        self.config = c = config
        self.parts = c.parts()
        self.embedder = NGrams(c)
        self.encoder, self.core, self.decoder = map(Core, self.parts)
        size = c.latents * c.latent_width
        self.pool, self.first = Pool(c), nn.Parameter(torch.zeros(size))  # before the first sentence
        self.down, self.up = nn.Linear(size, c.n_embd, bias=False), nn.Linear(c.n_embd, size, bias=False)
        self.norm = RMSNorm(c.n_embd, 1e-5, False)
        self.conditions = nn.ModuleList(nn.Linear(size, c.width, bias=False) for _ in self.decoder.blocks)
        self.head = Head(self.parts[0])
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=zero_std(self.parts[1], name, module.weight.shape[-1]))

    def forward(self, idx, targets=None, cache=None, segments=None, last=False):
        """
        idx (B, T) -> (logits (B, T, vocab_size), None); with targets -> (None, mean loss in nats). With a new
        cache, segments (B, T) is 0 for padding, which is on the left.
        """
        extra = 0.0
        if cache is not None and cache.started:
            x = self.step(idx, cache)
        elif cache is not None:
            x = self.prompt(idx, cache, segments)
        else:
            x, starts, sentence = self.encode(idx)
            actual = self.latents(x, sentence, int(sentence.max()) + 1)
            predicted = self.predict(actual)
            if targets is not None and self.training and self.config.nextlat:
                extra = self.config.nextlat * (predicted - actual.detach()).square().mean()
            x = self.decode(x, starts, sentence, predicted)
        if targets is not None:
            logits, loss = self.head.loss(x, targets)
            return logits, loss + extra
        return self.head(x[:, -1:] if last else x), None

    def local(self, idx: Tensor, starts: Tensor) -> AttnInputs:
        """What attention within sentences needs; starts (B, T): where the sentence of each byte begins."""
        attn = attn_inputs(self.parts[0], idx)[1]
        if self.config.context == "full":
            return attn
        return attn._replace(kernel=local_kernel(self.config.window, starts))

    def encode(self, idx: Tensor, cache=None) -> tuple[Tensor, Tensor, Tensor]:
        """idx (B, T) -> states (B, T, width); where each byte's sentence starts, and its number, (B, T)."""
        steps = torch.arange(idx.shape[1], device=idx.device)
        before = idx.new_full((len(idx), max(2, self.embedder.before)), EOT)
        begins = sentence_starts(idx, before) | (steps == 0)
        starts = (steps * begins).cummax(dim=1).values
        x = self.embedder(idx, before[:, : self.embedder.before], steps - starts)
        return self.encoder(x, self.local(idx, starts), cache), starts, begins.cumsum(dim=1) - 1

    def latents(self, x: Tensor, sentence: Tensor, n: int) -> Tensor:
        """States of bytes (B, T, width) -> latents of the n sentences, (B, n, latents * latent_width)."""
        return self.pool(self.sums(x, sentence, n))

    def sums(self, x: Tensor, sentence: Tensor, n: int) -> Tensor:
        terms = self.pool.terms(x).flatten(0, 1)  # (B * T, latents, width + 1)
        place = (sentence + n * torch.arange(len(x), device=x.device)[:, None]).flatten()
        return terms.new_zeros(len(x) * n, *terms.shape[1:]).index_add(0, place, terms).unflatten(0, (-1, n))

    def predict(self, latents: Tensor, cache=None) -> Tensor:
        """Latents of sentences -> their predictions from the sentences before them, of the same shape."""
        if self.config.context == "none":
            return torch.zeros_like(latents)
        seen = torch.cat((self.first.expand(len(latents), 1, -1), latents[:, :-1]), dim=1)
        attn = attn_inputs(self.parts[1], seen[..., 0])[1]
        return self.up(self.norm(self.core(self.down(seen), attn, cache)))

    def decode(self, x: Tensor, starts: Tensor, sentence: Tensor, predicted: Tensor, cache=None) -> Tensor:
        """States after the encoder, and predicted latents of each sentence -> states after the decoder."""
        attn, n = self.local(sentence, starts), predicted.shape[1]
        place = (sentence + n * torch.arange(len(x), device=x.device)[:, None]).flatten()
        for layer, (block, condition) in enumerate(zip(self.decoder.blocks, self.conditions, strict=True)):
            added = condition(predicted).flatten(0, 1).index_select(0, place).view(x.shape)
            x = block(x + added, attn, layer, cache)
        return x

    def prompt(self, idx: Tensor, cache: Cache, segments: Tensor | None) -> Tensor:
        """Fill a new cache. -> states (B, T, width); with segments, of the last bytes, (B, 1, width)."""
        (encoder, core, decoder), (idx, lengths) = cache.stores, pad_right(idx, segments)
        rows, steps = (torch.arange(n, device=idx.device) for n in idx.shape)
        x, starts, sentence = self.encode(idx, encoder)
        n, last = int(sentence.max()) + 1, lengths - 1
        own = torch.where(steps < lengths[:, None], sentence, n)  # without padding
        sums = self.sums(x, own, n + 1)[:, :n]
        predicted = self.predict(self.pool(sums), core)
        x = self.decode(x, starts, sentence, predicted, decoder)
        now = sentence[rows, last]
        core.fill(now + 1)
        state = {"sums": sums[rows, now], "held": predicted[rows, now], "start": starts[rows, last]}
        cache.rows = state
        cache.begin(idx, idx.new_full((len(idx), max(2, self.embedder.before)), EOT), lengths)
        return x if segments is None else x[rows, last][:, None]

    def step(self, idx: Tensor, cache: Cache) -> Tensor:
        """The states of one more byte in each row, (B, 1, width)."""
        (encoder, core, decoder), state = cache.stores, cache.rows
        every = torch.arange(len(idx), device=idx.device)
        begins = sentence_starts(idx, state["before"])[:, 0]
        if len(rows := begins.nonzero()[:, 0]) and self.config.context != "none":
            seen = self.down(self.pool(state["sums"][rows]))[:, None]
            predicted = self.core(seen, core.attend(rows, self.parts[1]), core)
            state["held"][rows] = self.up(self.norm(predicted))[:, 0]
        state["sums"] = state["sums"] * ~begins[:, None, None]
        state["start"] = torch.where(begins, state["length"], state["start"])
        starts = None if self.config.context == "full" else state["start"]
        place = (state["length"] - state["start"])[:, None]
        x = self.embedder(idx, state["before"], place)
        x = self.encoder(x, encoder.attend(every, self.parts[0], starts), encoder)
        state["sums"] = state["sums"] + self.pool.terms(x[:, 0])
        attn = decoder.attend(every, self.parts[2], starts)
        for layer, (block, condition) in enumerate(zip(self.decoder.blocks, self.conditions, strict=True)):
            x = block(x + condition(state["held"])[:, None], attn, layer, decoder)
        cache.advance(idx)
        return x

    def new_cache(self, rows: int) -> Cache:
        c = self.config
        return Cache(Store(c.window), Store(c.block_size), Store(c.window))

    @torch.no_grad()
    def predict_next(self, idx: Tensor) -> Tensor:
        """The predicted latents (B, latents * latent_width) of the sentence after each row of idx (B, T)."""
        x, _, sentence = self.encode(idx)
        predicted = self.predict(self.latents(x, sentence, int(sentence.max()) + 2))
        return predicted[torch.arange(len(idx), device=idx.device), sentence[:, -1] + 1]

    @torch.no_grad()
    def write_sentences(
        self, predicted: Tensor, rng: torch.Generator | None = None, most: int = 200
    ) -> list[bytes]:
        """
        A sentence for each row of predicted latents (B, latents * latent_width), after white space: sampled,
        or without rng the likeliest bytes, up to the start of the next sentence or `most` bytes.
        """
        idx = torch.full((len(predicted), 1), ord(" "), device=predicted.device)
        for _ in range(most):
            x, starts, sentence = self.encode(idx)
            x = self.decode(x, starts, torch.zeros_like(sentence), predicted[:, None])
            p = self.head(x[:, -1]).float().softmax(dim=-1)
            new = p.argmax(-1, keepdim=True) if rng is None else torch.multinomial(p, 1, generator=rng)
            idx = torch.cat((idx, new), dim=1)
        begins = sentence_starts(idx, torch.full_like(idx[:, :2].expand(-1, 2), EOT))
        begins[:, 0] = False
        ends = [row.nonzero()[0].item() if row.any() else idx.shape[1] for row in begins]
        return [bytes(row[1:end]) for row, end in zip(idx.tolist(), ends, strict=True)]
