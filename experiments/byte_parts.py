"""
Parts of the experiments that read bytes: the embedding of hashed n-grams, attention within a window, and a
cache for generation in which each row of a batch has its own number of tokens.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import AttnInputs, GPTConfig, RMSNorm, rope_table

EOT = 256  # the ids are bytes and end-of-text


class NGrams(nn.Module):
    """
    ids (B, T), and at least `ngram` - 1 ids `before` them -> (B, T, width). With place (B, T), ids from more
    than `place` bytes ago count as end-of-text.
    """

    def __init__(self, c):
        super().__init__()
        self.before, self.rows = c.ngram - 1, c.ngram_rows
        self.tokens = nn.Embedding(EOT + 1, c.width)
        self.table = nn.Embedding(self.before * c.ngram_rows, c.ngram_width) if self.before else None
        self.mix = nn.Linear(self.before * c.ngram_width, c.width, bias=False) if self.before else None
        self.norm, self.drop = RMSNorm(c.width, 1e-5, False), nn.Dropout(c.dropout)

    def forward(self, idx: Tensor, before: Tensor, place: Tensor | None = None) -> Tensor:
        x, end = self.tokens(idx), before.shape[1]
        if self.before:
            ids, hashed, found = torch.cat((before, idx), dim=1), idx, []
            for n in range(1, self.before + 1):  # of the last n + 1 bytes
                earlier = ids[:, end - n : -n]
                earlier = earlier if place is None else torch.where(place < n, EOT, earlier)
                hashed = (hashed * 1_000_003 + earlier + n) % (2**31 - 1)
                found.append(hashed % self.rows + (n - 1) * self.rows)
            x = x + self.mix(self.table(torch.stack(found, dim=-1)).flatten(-2))
        return self.drop(self.norm(x))


def local_kernel(window: int, starts: Tensor | None = None) -> Callable[..., Tensor]:
    """
    A kernel, called like model.sdpa, for causal attention to the last `window` keys, by blocks. With starts
    (B, T), a query attends to no key before its start.
    """

    def kernel(q, k, v, attn_mask=None, is_causal=True, dropout=0.0) -> Tensor:
        B, H, T, D = q.shape
        W = min(window, T)
        q, k, v = (F.pad(x, (0, 0, 0, -T % W)).view(B, H, -1, W, D) for x in (q, k, v))
        N = q.shape[2]
        k, v = (torch.cat((F.pad(x, (0, 0, 0, 0, 1, -1)), x), dim=3) for x in (k, v))  # and the block before
        steps = torch.arange(N * W, device=q.device).view(N, W, 1)  # positions of queries, and of keys:
        keys = steps[:, :1] - W + torch.arange(2 * W, device=q.device)
        hidden = (keys > steps) | (keys <= steps - window) | (keys < 0)  # (N, W, 2 W)
        if starts is not None:
            hidden = hidden | (keys < F.pad(starts, (0, -T % W)).view(B, 1, N, W, 1))
        mask = torch.zeros(hidden.shape, dtype=q.dtype, device=q.device).masked_fill_(hidden, -torch.inf)
        probs = (q * D**-0.5 @ k.mT + mask).softmax(dim=-1)
        probs = F.dropout(probs, dropout) if dropout else probs
        return (probs.to(v.dtype) @ v).view(B, H, -1, D)[:, :, :T]

    return kernel


# ----------------------------------------------------------------------------------------------------------
# Generation


def pad_right(idx: Tensor, segments: Tensor | None) -> tuple[Tensor, Tensor]:
    """Move padding, segment 0 on the left of idx (B, T), to the right. -> idx, and lengths (B,)."""
    T, steps = idx.shape[1], torch.arange(idx.shape[1], device=idx.device)
    lengths = idx.new_full((len(idx),), T) if segments is None else (segments > 0).sum(dim=1)
    return idx.gather(1, (steps + T - lengths[:, None]).clamp(max=T - 1)), lengths


class Store:
    """
    Keys and values of a stack of layers, called like a KVCache by its attention layers. Each row has its own
    number of tokens; the last `size` are kept, token p in column p % size.
    """

    def __init__(self, size: int):
        self.size = size
        self.k: list[Tensor] = []  # of each layer: (B, n_head, columns, head_dim)
        self.v: list[Tensor] = []
        self.count: Tensor | None = None  # (B,): tokens so far; None: during the first pass
        self.rows = self.columns = torch.empty(0)  # of the tokens of this pass

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keep a layer's keys and values (B, n_head, T, head_dim); return those to attend to."""
        if self.count is None:
            self.k.append(k)
            self.v.append(v)
            return k, v
        self.k[layer][self.rows, :, self.columns] = k[:, :, 0]
        self.v[layer][self.rows, :, self.columns] = v[:, :, 0]
        return self.k[layer][self.rows], self.v[layer][self.rows]

    def fill(self, count: Tensor) -> None:
        """After the first pass, of `count` (B,) tokens: keep the last of each row."""
        self.count = count.clone()
        if self.k:
            index = self.positions(count, min(self.size, self.k[0].shape[2])).clamp(min=0)[:, None, :, None]
            self.k = [k.take_along_dim(index, dim=2) for k in self.k]
            self.v = [v.take_along_dim(index, dim=2) for v in self.v]

    def positions(self, count: Tensor, columns: int) -> Tensor:
        """The position in each column, (B, columns), after `count` (B,) tokens; negative: none."""
        last = count[:, None] - 1
        return last - (last - torch.arange(columns, device=count.device)) % columns

    def attend(self, rows: Tensor, c: GPTConfig, starts: Tensor | None = None) -> AttnInputs:
        """What attention needs for one more token in each of `rows`; with starts, to no earlier position."""
        count = self.count[rows]
        if self.k:
            full = self.k[0].shape[2]
            if full < self.size and int(count.max()) >= full:  # more columns, which no token has left yet
                more = (0, 0, 0, min(self.size - full, max(64, full)))
                self.k, self.v = ([F.pad(x, more) for x in store] for store in (self.k, self.v))
            columns = self.k[0].shape[2]
            self.rows, self.columns = rows, count % columns
            first = 0 if starts is None else starts[:, None]
            empty = self.positions(count + 1, columns) < first
            mask = torch.zeros(empty.shape, device=empty.device).masked_fill(empty, -torch.inf)
        rope = rope_table(count[:, None, None], c.head_dim, c.rope_theta)
        self.count[rows] += 1
        return AttnInputs(rope, mask[:, None, None] if self.k else None, False)

    def select(self, rows: list[int]) -> None:
        self.k, self.v = ([x[rows] for x in store] for store in (self.k, self.v))
        self.count = self.count[rows]


class Cache:
    """What the next byte needs: keys and values, and for each row the tensors in `rows`."""

    def __init__(self, *stores: Store):
        self.stores, self.started = stores, False  # of encoder, core and decoder
        self.rows: dict[str, Tensor] = {}  # (B, ...) each; "before": the last ids, "length": ids so far

    def begin(self, idx: Tensor, before: Tensor, lengths: Tensor) -> None:
        """After the first pass over idx (B, T), of which `lengths` (B,) ids are no padding."""
        self.started, n = True, before.shape[1]
        columns = lengths[:, None] + torch.arange(n, device=idx.device)
        self.rows |= {"before": torch.cat((before, idx), dim=1).gather(1, columns), "length": lengths}
        for store in self.stores:
            if store.count is None:
                store.fill(lengths)

    def advance(self, idx: Tensor) -> None:
        """One more id in each row, idx (B, 1)."""
        before = torch.cat((self.rows["before"][:, 1:], idx), dim=1)
        self.rows |= {"before": before, "length": self.rows["length"] + 1}

    def select(self, rows: list[int]) -> None:
        """Index the batch by `rows`, with repetition allowed."""
        self.rows = {name: x[rows] for name, x in self.rows.items()}
        for store in self.stores:
            store.select(rows)
