"""
KV cache: keys and values of previous tokens, so that generation computes each token once.

    cache = KVCache(model.config, batch_size=2)
    logits, _ = model(prompt, cache=cache)      # (2, T): the first pass takes the whole prompt
    logits, _ = model(idx, cache=cache)         # (2, 1), then (2, 1), ...: one token at a time

With max_draft=n, a pass after the prompt may have up to n + 1 tokens, and drop(m) forgets the last m: for
speculative decoding. cache.static() is a copy whose operations have fixed shapes, for torch.compile.

GPT.forward calls begin (positions and mask of a pass), update and update_pointer (store what is new, return
all that is needed) and advance (the pass is complete).
"""

from dataclasses import replace

import torch
from torch import Tensor

from model import AttnInputs, GPTConfig, attn_inputs, make_attn_mask, rope_table, sdpa


class Columns:
    """
    Base class of both caches: tensors (..., size, width), with position p in column p % size.
    """

    def __init__(self, config: GPTConfig, k, v, states: Tensor, ids: Tensor, starts: Tensor | None):
        self.config, self.size = config, ids.shape[1]
        self.k, self.v = k, v  # of each layer: (B, n_kv_head, size, head_dim)
        self.states, self.ids = states, ids  # of the pointer: (B, size, 2 * n_embd), (B, size, 1)
        self.starts = starts  # (B, size, 1): position at which the token's segment starts; None: one segment

    def write(self, store: Tensor, new: Tensor) -> Tensor:
        """Store new (..., T, width) in its columns; return what the new tokens attend to, (..., S, width)."""
        raise NotImplementedError

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store a layer's new keys and values (B, n_kv_head, T, head_dim); return those to attend to."""
        return self.write(self.k[layer], k), self.write(self.v[layer], v)

    def update_pointer(self, states: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Store the pointer's new states (B, T, 2 * n_embd) and ids (B, T); return those to copy from."""
        return self.write(self.states, states), self.write(self.ids, ids[..., None])[..., 0]

    def after(
        self, idx: Tensor, seen: int | Tensor, S: int, masked: bool, kernel
    ) -> tuple[Tensor, AttnInputs]:
        """Positions and AttnInputs of idx (B, T) after `seen` tokens, over the first S columns."""
        c, T, device = self.config, idx.shape[1], idx.device
        steps = positions = seen + torch.arange(T, device=device)  # (T,)
        distance = mask = starts = key_starts = None
        if self.starts is not None:  # a new token belongs to the last segment, or begins one
            before = self.starts[:, (steps[:1] - 1) % self.size, 0]  # (B, 1)
            starts = torch.where(idx == c.separator, steps, before)  # (B, T)
            starts = starts.cummax(dim=1).values if T > 1 else starts
            key_starts = self.write(self.starts, starts[..., None])[..., 0]  # (B, S)
            positions = steps - starts
        if masked or c.pointer:
            age = (seen + T - 1 - torch.arange(S, device=device)) % self.size  # (S,): 0 is the newest token
            distance = age - torch.arange(T - 1, -1, -1, device=device)[:, None] if T > 1 else age[None]
            if isinstance(seen, Tensor):  # all columns are returned: mask those that are not filled yet
                distance = torch.where(age >= seen + T, -1, distance)  # (T, S)
        if masked:
            mask = make_attn_mask(c, distance, starts, key_starts)
        rope = rope_table(positions.unsqueeze(-2), c.head_dim, c.rope_theta) if c.position == "rope" else None
        return positions, AttnInputs(rope, mask, False, distance, kernel)


class KVCache(Columns):
    """
    A cache of min(block_size, window) + max_draft columns, allocated once. Generation can continue past the
    context: each token attends to the block_size tokens up to itself.

    Padding on the left of a prompt is a segment of its own: pass the model segments of 0 for padding and 1
    for text. With config.separator, each separator begins a segment, in the prompt and after it.
    segmented=False ignores separators: one token at a time then needs no mask. It is for rows that are one
    document each.
    """

    def __init__(
        self,
        config: GPTConfig,
        batch_size: int,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        max_draft: int = 0,
        segmented: bool | None = None,
    ):
        c = config
        if not c.causal:
            raise ValueError("only a causal model can generate with a cache")
        window = min(c.block_size, c.window or c.block_size)
        size = window + max_draft
        k, v = (
            torch.zeros(c.n_layer, batch_size, c.kv_heads, size, c.head_dim, device=device, dtype=dtype)
            for _ in "kv"
        )
        states = torch.zeros(batch_size, size, 2 * c.n_embd * c.pointer, device=device, dtype=dtype)
        ids = torch.zeros(batch_size, size, 1, device=device, dtype=torch.int64)
        separator = -1 if segmented is False else c.separator
        super().__init__(replace(c, window=window, separator=separator), k, v, states, ids, None)
        self.max_draft = max_draft
        self.seen = 0  # tokens so far
        self.highest = 0  # the most tokens so far, before any were dropped

    def begin(self, idx: Tensor, segments: Tensor | None = None) -> tuple[Tensor, AttnInputs]:
        """Begin a pass over idx (B, T): its positions and AttnInputs."""
        c, (B, T) = self.config, idx.shape
        if not self.seen:  # the prompt attends to itself
            positions, attn = attn_inputs(c, idx, segments)
            self.starts = None
            if positions.ndim == 2:
                self.starts = torch.zeros(B, self.size, 1, device=idx.device, dtype=torch.int64)
                self.write(self.starts, (torch.arange(T, device=idx.device) - positions)[..., None])
            return positions, attn
        if segments is not None:
            raise ValueError("a cache takes segments with the prompt only")
        if T > self.max_draft + 1:
            limit = f"{self.max_draft + 1} tokens at a time" if self.max_draft else "one token at a time"
            raise ValueError(f"a cache takes the prompt in one pass, then {limit} (max_draft), not {T}")
        last = self.seen + T
        if c.position == "learned" and last > c.block_size:
            raise ValueError(f"{last} tokens, but learned positions end at block_size={c.block_size}")
        all_visible = T == 1 and (last <= c.window or not self.max_draft) and self.starts is None
        masked = not all_visible or c.position in ("shaw", "alibi")
        return self.after(idx, self.seen, min(last, self.size), masked, sdpa)

    def write(self, store: Tensor, new: Tensor) -> Tensor:
        T = new.shape[-2]
        if not self.seen:  # the prompt: its last tokens are kept
            columns = torch.arange(max(0, T - self.size), T, device=new.device)
            store[..., columns % self.size, :] = new[..., columns, :].to(store.dtype)
            return new
        at = self.seen % self.size
        if at + T <= self.size:
            store[..., at : at + T, :] = new
        else:
            columns = torch.arange(self.seen, self.seen + T, device=new.device) % self.size
            store[..., columns, :] = new.to(store.dtype)
        return store[..., : min(self.seen + T, self.size), :]

    def advance(self, T: int) -> None:
        """T tokens have been seen."""
        self.seen += T
        self.highest = max(self.highest, self.seen)

    def drop(self, n: int) -> None:
        """
        Forget the last n tokens: up to max_draft before the furthest position so far, or more if every
        position that later tokens attend to is still stored. Otherwise raises ValueError.
        """
        kept = self.seen - n
        needed = max(0, kept - max(1, self.config.window - 1))  # the oldest position that is needed
        if n < 0 or kept < 0 or needed < self.highest - self.size:
            raise ValueError(f"cannot drop {n} of {self.seen} tokens: max_draft={self.max_draft}")
        self.seen = kept

    def select(self, rows: list[int]) -> None:
        """Index the batch by `rows`, with repetition allowed."""
        self.k, self.v = self.k[:, rows], self.v[:, rows]
        self.ids, self.states = self.ids[rows], self.states[rows]
        self.starts = None if self.starts is None else self.starts[rows]

    def static(self) -> "StaticKVCache":
        """A copy, after the prompt, for a compiled step."""
        if not self.seen:
            raise ValueError("a static cache is made after the prompt")
        return StaticKVCache(self)


class StaticKVCache(Columns):
    """
    A cache after the prompt, for a single compiled step: the number of tokens seen is a
    tensor, and all columns are exposed, filled or not. The batch size is fixed.
    """

    def __init__(self, cache: KVCache):
        k, v = list(cache.k.clone()), list(cache.v.clone())
        starts = None if cache.starts is None else cache.starts.clone()
        super().__init__(cache.config, k, v, cache.states.clone(), cache.ids.clone(), starts)
        self.seen = torch.tensor([cache.seen], device=cache.ids.device)

    def begin(self, idx: Tensor, segments: Tensor | None = None) -> tuple[Tensor, AttnInputs]:
        kernel = one_query if idx.shape[1] == 1 and idx.device.type == "cpu" else sdpa
        return self.after(idx, self.seen, self.size, True, kernel)

    def write(self, store: Tensor, new: Tensor) -> Tensor:
        columns = (self.seen + torch.arange(new.shape[-2], device=new.device)) % self.size
        store.index_copy_(-2, columns, new.to(store.dtype))
        return store.to(new.dtype)  # on a CPU, a compiled step computes in float32 over a 16-bit cache

    def advance(self, T: int) -> None:
        self.seen += T


def one_query(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor, is_causal=False, dropout=0.0) -> Tensor:
    """
    Attention of q (B, n_head, 1, head_dim) by its formula in float32, over all of k and v (B, n_kv_head, S,
    head_dim). Compiled, it becomes one loop with the operations around it, without a call of a kernel.
    """
    k, v = (x.float().repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    score = (q.float() * q.shape[-1] ** -0.5 * k).sum(dim=-1, keepdim=True)  # (B, n_head, S, 1)
    return ((score + attn_mask.mT).softmax(dim=-2) * v).sum(dim=-2, keepdim=True).to(q.dtype)
