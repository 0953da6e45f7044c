"""The components that settings select: each against a direct reference, and in combination."""

import math
import random
from itertools import combinations, product

import pytest
import torch
import torch.nn.functional as F
from test_config import check_counts
from test_model import TINY, V, rel_error, run_on_meta, tiny, tokens

from model import CHOICES, GPT, MLPS, AttnInputs, Block, GPTConfig, attn_inputs
from nanostlm.kv_cache import KVCache
from nanostlm.variants import INITS, SHARES, LoRA, alibi_slopes, bigram_init, flex_attention, sinusoids

POSITIONS = CHOICES["position"]

# ----------------------------------------------------------------------------------------------------------
# The settings of each part, and a small set of models in which every pair of them occurs

NORMS = {"rmsnorm": {}, "layernorm": dict(norm="layernorm", bias=True), "nonorm": dict(norm="none")}
POSITION_SETTINGS = {name: dict(position=name) for name in POSITIONS} | {
    "shaw_values": dict(position="shaw", shaw_values=True, shaw_clip=3)
}
ATTENTIONS = {
    "multihead": {},
    "grouped": dict(n_kv_head=2),
    "multiquery": dict(n_kv_head=1),
    "window": dict(window=5),
    "qk_norm": dict(qk_norm=True),
    "grouped_window": dict(n_kv_head=2, window=3, qk_norm=True),
}
MLP_SETTINGS = {name: dict(mlp=name) for name in MLPS}
SHARED = {f"share_{name}": dict(share=name, lora_rank=2) for name in CHOICES["share"]}
PARTS = [NORMS, POSITION_SETTINGS, ATTENTIONS, MLP_SETTINGS, SHARED]
POINTERS = {"vocab": {}, "pointer": dict(pointer=True)}
OPTIONS = [
    {"tied": {}, "untied": dict(tied=False)},
    {"default": {}, "embed_norm": dict(embed_norm=True), "no_norm_weight": dict(norm_weight=False)},
    {f"init_{name}": dict(init=name) for name in INITS},
    {"plain": {}, "capped": dict(softcap=5.0), "z": dict(z_loss=0.1), "smooth": dict(label_smoothing=0.1)}
    | {"pointer": dict(pointer=True), "pointer_capped": dict(pointer=True, softcap=5.0)},
    {"chunked": dict(loss_chunk=7), "unchunked": dict(loss_chunk=0)},
]


def pairwise(factors: list[dict]) -> list[tuple[str, ...]]:
    """A covering array: rows of one name per factor that contain every pair of names of two factors."""
    rng, columns, rows = random.Random(0), list(combinations(range(len(factors)), 2)), []
    missing = {((i, a), (j, b)) for i, j in columns for a in factors[i] for b in factors[j]}
    while missing:
        row = dict(min(missing))
        for k in rng.sample([k for k in range(len(factors)) if k not in row], len(factors) - 2):
            names = rng.sample(list(factors[k]), len(factors[k]))
            n_new = [sum(tuple(sorted(((k, name), o))) in missing for o in row.items()) for name in names]
            row[k] = names[n_new.index(max(n_new))]
        missing -= {((i, row[i]), (j, row[j])) for i, j in columns}
        rows.append(tuple(row[k] for k in range(len(factors))))
    return rows


def settings_of(names: tuple[str, ...], factors: list[dict]) -> dict:
    chosen = (factor[name] for name, factor in zip(names, factors, strict=True))
    return {key: value for settings in chosen for key, value in settings.items()}


def parametrize_settings(factors: list[dict], rows=None):
    """Parametrize a test with `settings`, from `rows` of names or from a pairwise covering array."""
    rows = pairwise(factors) if rows is None else rows
    rows = [pytest.param(settings_of(row, factors), id="-".join(row)) for row in rows]
    return pytest.mark.parametrize("settings", rows)


def test_pairwise_contains_every_pair():
    for factors in (PARTS, PARTS + OPTIONS):
        rows = [dict(enumerate(row)) for row in pairwise(factors)]
        for i, j in combinations(range(len(factors)), 2):
            assert {(row[i], row[j]) for row in rows} == set(product(factors[i], factors[j]))
    assert len(pairwise(PARTS)) < 100


@torch.no_grad()
def check_causality(model: GPT) -> None:
    """Changing token t leaves the logits before t bitwise equal and changes some at t or after it."""
    idx = tokens(1, 13)
    before = model(idx)[0]
    for t in (0, 1, 6, 12):
        changed = idx.clone()
        changed[0, t] = (idx[0, t] + 1) % V
        after = model(changed)[0]
        assert torch.equal(before[:, :t], after[:, :t]) and not torch.equal(before[:, t:], after[:, t:])


@torch.no_grad()
def check_cache(model: GPT, lengths=(6, 3, 1), total=14) -> None:
    """Left-padded prompts of different lengths, then one token at a time, match the full forward pass."""
    width, rows = max(lengths), [tokens(total - max(lengths) + n, seed=n) for n in lengths]
    cache, starts = KVCache(model.config, len(rows)), torch.tensor([width - n for n in lengths])
    padded = torch.stack([F.pad(row, (total - len(row), 0)) for row in rows])
    segments = (torch.arange(width) >= starts[:, None]).long()
    parts = [model(padded[:, :width], cache=cache, segments=segments)[0]]
    parts += [model(padded[:, i : i + 1], cache=cache)[0] for i in range(width, total)]
    cached = torch.cat(parts, dim=1)
    for row, logits in zip(rows, cached, strict=True):
        assert rel_error(logits[-len(row) :], model(row[None])[0][0]) < 1e-5


@parametrize_settings([*PARTS, POINTERS])
def test_causality_and_cache(settings):
    model = tiny(**settings)
    check_causality(model)
    check_cache(model)


@pytest.mark.slow
@parametrize_settings(PARTS[:3], product(*PARTS[:3]))
def test_causality_and_cache_for_all_combinations(settings):
    for names in product(*PARTS[3:], POINTERS):
        model = tiny(**settings, **settings_of(names, [*PARTS[3:], POINTERS]))
        check_causality(model)
        check_cache(model)


@parametrize_settings([*PARTS[1:3], POINTERS], product(*PARTS[1:3], POINTERS))
@torch.no_grad()
def test_cache_without_padding_and_past_the_context(settings):
    """Prompts of equal length; past the context, a token attends to the last block_size tokens."""
    model, idx = tiny(**settings), tokens(2, 45)
    length = 16 if settings["position"] == "learned" else 45
    windowed = tiny(**{**settings, "window": settings.get("window") or 16})
    expected = windowed(idx[:, :length])[0]
    for prompt in (1, 7, 16, 30):
        cache = KVCache(model.config, 2)
        if prompt > length:
            continue
        parts = [model(idx[:, :prompt], cache=cache)[0]]
        parts += [model(idx[:, i : i + 1], cache=cache)[0] for i in range(prompt, length)]
        assert rel_error(torch.cat(parts, dim=1), expected) < 1e-5
        assert cache.seen == length


@torch.no_grad()
def test_cache_with_padding_past_the_context():
    for settings in POSITION_SETTINGS.values():
        if settings["position"] != "learned":
            model, width, total = tiny(**settings, window=8), 5, 30
            check_cache(model, lengths=(width, 2), total=total)
            check_cache(tiny(**settings, window=8, pointer=True), lengths=(width, 2), total=total)


def test_only_learned_positions_are_limited_to_block_size():
    model = tiny(position="learned")
    model(tokens(1, 16))
    with pytest.raises(ValueError, match="block_size=16"):
        model(tokens(1, 17))
    cache = KVCache(model.config, 1)
    with pytest.raises(ValueError, match="block_size=16"):
        model(tokens(1, 17), cache=cache)
    model(tokens(1, 16), cache=cache)
    with pytest.raises(ValueError, match="block_size=16"):
        model(tokens(1, 1), cache=cache)
    for name, settings in POSITION_SETTINGS.items():
        if name != "learned":
            check_causality(tiny(**settings, block_size=8))
            assert tiny(**settings)(tokens(1, 50))[0].isfinite().all()


def test_cache_rejects_a_second_prompt():
    model = tiny()
    cache = KVCache(model.config, 1)
    model(tokens(1, 4), cache=cache)
    with pytest.raises(ValueError, match="one token at a time"):
        model(tokens(1, 2), cache=cache)
    with pytest.raises(ValueError, match="with the prompt only"):
        model(tokens(1, 1), cache=cache, segments=torch.ones(1, 1))
    cache = KVCache(model.config, 1, max_draft=2)
    model(tokens(1, 4), cache=cache)
    with pytest.raises(ValueError, match="then 3 tokens at a time"):
        model(tokens(1, 4), cache=cache)


@parametrize_settings(PARTS + OPTIONS)
def test_gradients_match_finite_differences(settings):
    """Directional derivatives of the loss, in float64."""
    model, idx = tiny(**settings).double().train(), tokens(2, 8)
    params, step = list(model.parameters()), 1e-7
    model(idx, tokens(2, 8, seed=2))[1].backward()
    for seed in range(2):
        rng = torch.Generator().manual_seed(seed)
        direction = [torch.randn(p.shape, generator=rng, dtype=p.dtype) for p in params]
        slope, losses = sum((p.grad * d).sum().item() for p, d in zip(params, direction, strict=True)), []
        with torch.no_grad():
            for delta in (step, -2 * step, step):
                for p, d in zip(params, direction, strict=True):
                    p += delta * d
                losses.append(model(idx, tokens(2, 8, seed=2))[1].item())
        assert (losses[0] - losses[1]) / (2 * step) == pytest.approx(slope, rel=1e-4, abs=1e-5)


@parametrize_settings(PARTS)
def test_every_parameter_has_a_gradient(settings):
    model, idx = tiny(**settings).train(), tokens(2, 12)
    model(idx, tokens(2, 12, seed=2))[1].backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.abs().max() > 0, name


@parametrize_settings(PARTS + OPTIONS)
def test_meta_device(settings):
    run_on_meta(settings)


COMPILE_FACTORS = [
    POSITION_SETTINGS,
    {k: ATTENTIONS[k] for k in ("multihead", "grouped", "window")},
    SHARED,
    *OPTIONS[3:],
]


@parametrize_settings(COMPILE_FACTORS, pairwise(COMPILE_FACTORS)[::4])
def test_compiles_as_one_graph(settings):
    torch._dynamo.reset()
    model, idx = tiny(**settings).train(), tokens(2, 9)
    expected = torch.autograd.grad(model(idx, idx)[1], list(model.parameters()))
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    actual = torch.autograd.grad(compiled(idx, idx)[1], list(model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(expected, actual, strict=True))


@pytest.mark.slow
@parametrize_settings(PARTS + OPTIONS)
def test_compiles_as_one_graph_for_all_pairs(settings):
    test_compiles_as_one_graph(settings)


@parametrize_settings([POSITION_SETTINGS, {k: ATTENTIONS[k] for k in ("multihead", "grouped_window")}])
def test_bfloat16_is_close_to_float32(settings):
    model, idx, targets = tiny(**settings), tokens(4, 16), tokens(4, 16, seed=2)
    expected = model(idx, targets)[1].item()
    with torch.autocast("cpu", torch.bfloat16):
        assert model(idx, targets)[1].item() == pytest.approx(expected, rel=0.01)
    assert model.bfloat16()(idx, targets)[1].item() == pytest.approx(expected, rel=0.03)


# ----------------------------------------------------------------------------------------------------------
# KV cache: several tokens per pass, drop(), segments, static shapes


def check_passes(model: GPT, batch: int, total: int, seed: int, max_draft: int, **options) -> int:
    """
    Feed a stream to a cache in random passes of up to max_draft + 1 tokens, drop as many tokens as the cache
    allows at random, and continue with others. Every logit must match that of a model without a cache, with
    the cache's window. `options`: segmented, and pads (B,), the padding of each prompt. -> number of passes.
    """
    rng, c = random.Random(seed), model.config
    pads = options.pop("pads", None)
    separated = c.separator >= 0 and options.get("segmented") is not False
    reference = tiny(**{**vars(c), "window": c.window or c.block_size, "separator": -1}).to(
        model.head.linear.weight.dtype
    )
    cache = KVCache(c, batch, max_draft=max_draft, **options)
    stream, passes = tokens(batch, rng.choice([1, 5, total // 2]), seed=seed), 0
    if pads is not None:
        stream = tokens(batch, 5, seed=seed)
    start = 0
    while stream.shape[1] <= total:
        passes += 1
        segments = (stream == c.separator).cumsum(dim=1) if separated else torch.ones_like(stream)
        if pads is not None:
            padding = torch.arange(stream.shape[1]) < torch.tensor(pads)[:, None]
            segments = torch.where(padding, 0, 1 + segments)
        new = stream[:, start:]
        actual = model(new, cache=cache, segments=segments if pads is not None and not start else None)[0]
        expected = reference(stream, segments=segments)[0][:, start:]
        for row in range(batch):
            skip = max(0, (pads[row] if pads is not None else 0) - start)
            assert rel_error(actual[row, skip:], expected[row, skip:]) < 1e-5
        assert cache.seen == stream.shape[1]
        dropped = rng.choice([0, 0, 1, rng.randint(0, max_draft)]) if start else 0
        dropped = min(dropped, max_draft, cache.seen - 1)
        cache.drop(dropped)
        stream = stream[:, : cache.seen]
        start = cache.seen
        stream = torch.cat(
            (stream, tokens(batch, rng.randint(1, max_draft + 1), seed=rng.randrange(10**6))), dim=1
        )
    return passes


DRAFTS = [
    POSITION_SETTINGS,
    {k: ATTENTIONS[k] for k in ("multihead", "grouped", "window", "grouped_window")}
    | {"self_only": dict(window=1)},
    POINTERS,
    {"no_separator": {}, "separator": dict(separator=5)},
]


@parametrize_settings(DRAFTS)
@torch.no_grad()
def test_cache_with_drafts_and_drops(settings):
    """Before and after the ring buffer is full, with and without padding."""
    settings = {**settings, "block_size": 40 if settings["position"] == "learned" else 12}
    model, total = tiny(**settings), 38
    for seed in range(3):
        for max_draft in (0, 1, 4):
            assert check_passes(model, 2, total, seed, max_draft) > 5
            check_passes(model, 3, total, seed, max_draft, pads=[0, 2, 4])
    check_passes(model, 2, total, 0, 3, segmented=False)
    check_passes(model, 2, total, 0, 3, segmented=False, pads=[3, 0])


@torch.no_grad()
def test_limits_of_drop():
    """At least max_draft tokens; more while all needed columns are stored, up to the whole prompt."""
    model, idx = tiny(block_size=8), tokens(1, 30)
    cache = KVCache(model.config, 1, max_draft=3)
    model(idx[:, :20], cache=cache)
    with pytest.raises(ValueError, match="cannot drop 5 of 20 tokens"):
        cache.drop(5)
    cache.drop(4)  # the window of the next token is still stored: 16 - 7 >= 20 - 11
    with pytest.raises(ValueError, match="cannot drop"):
        cache.drop(1)
    windowed = tiny(block_size=8, window=8)
    actual = model(idx[:, 16:18], cache=cache)[0]
    assert rel_error(actual, windowed(idx[:, :18])[0][:, 16:]) < 1e-5
    with pytest.raises(ValueError, match="cannot drop"):  # tokens 18 and 19 have overwritten columns
        cache.drop(3)
    for n in (-1, 19):
        with pytest.raises(ValueError, match="cannot drop"):
            cache.drop(n)
    cache = KVCache(model.config, 1, max_draft=3)
    model(idx[:, :5], cache=cache)
    cache.drop(5)  # everything: the next pass is a prompt
    assert rel_error(model(idx[:, :9], cache=cache)[0], windowed(idx[:, :9])[0]) < 1e-5


@torch.no_grad()
def test_single_segment_needs_no_mask():
    """Without drafts and separators, one token attends to all stored columns, bitwise equal."""
    for settings in ({}, dict(n_kv_head=2, window=5), dict(separator=5)):
        model, idx = tiny(**settings), tokens(2, 30) % 5
        caches = [KVCache(model.config, 2, segmented=s) for s in (False, None)]
        for cache in caches:
            model(idx[:, :7], cache=cache)
        for i in range(7, 30):
            attn = caches[0].begin(idx[:, i : i + 1])[1]
            assert attn.attn_mask is None and not attn.is_causal
            a, b = (model(idx[:, i : i + 1], cache=cache)[0] for cache in caches)
            assert torch.equal(a, b)


@parametrize_settings(DRAFTS)
@torch.no_grad()
def test_static_cache_matches_cache(settings):
    """One or three tokens per pass, with padding and separators, before and after the buffer is full."""
    model = tiny(**{**settings, "block_size": 40 if settings["position"] == "learned" else 12})
    segments = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    for prompt_segments, T in product((None, segments), (1, 3)):
        cache, idx = KVCache(model.config, 2, max_draft=2), tokens(2, 35)
        with pytest.raises(ValueError, match="after the prompt"):
            cache.static()
        model(idx[:, :5], cache=cache, segments=prompt_segments)
        static = cache.static()
        for i in range(5, 35, T):
            new = idx[:, i : i + T]
            assert rel_error(model(new, cache=static)[0], model(new, cache=cache)[0]) < 1e-5


@torch.no_grad()
def test_static_cache_is_a_copy():
    model, idx = tiny(pointer=True, separator=5), tokens(2, 20) % 7
    cache = KVCache(model.config, 2)
    model(idx[:, :9], cache=cache)
    static = cache.static()
    for i in range(9, 20):
        model((idx[:, i : i + 1] + 1) % 7, cache=static)
    actual = torch.cat([model(idx[:, i : i + 1], cache=cache)[0] for i in range(9, 16)], dim=1)
    assert rel_error(actual, model(idx[:, :16])[0][:, 9:]) < 1e-5


@torch.no_grad()
def test_cache_select():
    model, idx = tiny(separator=5, pointer=True), tokens(3, 12) % 7
    cache = KVCache(model.config, 3)
    model(idx[:, :9], cache=cache)
    cache.select([2, 0, 2])
    assert (
        rel_error(model(idx[[2, 0, 2], 9:10], cache=cache)[0], model(idx[[2, 0, 2], :10])[0][:, -1:]) < 1e-5
    )


# ----------------------------------------------------------------------------------------------------------
# No leak of future tokens


def loss_after_training(**settings) -> float:
    """Loss on uniform independent tokens after training on others: at least log V without a leak."""
    torch.manual_seed(0)
    c = GPTConfig(**{**TINY, "vocab_size": 8, "n_layer": 1, **settings})
    model = GPT(c)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    for _ in range(80):
        idx = torch.randint(8, (64, 9))
        model(idx[:, :-1], idx[:, 1:])[1].backward()
        optimizer.step()
        optimizer.zero_grad()
    idx = torch.randint(8, (1024, 9))
    with torch.no_grad():
        return model.eval()(idx[:, :-1], idx[:, 1:])[1].item()


@parametrize_settings([POSITION_SETTINGS, OPTIONS[3]])
def test_random_tokens_cannot_be_predicted(settings):
    assert loss_after_training(**settings) > math.log(8) - 0.005


def test_random_tokens_can_be_predicted_without_causal_mask():
    assert loss_after_training(causal=False, position="learned") < math.log(8) - 0.2


# ----------------------------------------------------------------------------------------------------------
# Positions


def reference_attention(attention, x, bias=None, key_distance=None, value_distance=None, clip=0, causal=True):
    """Attention from its definition, with (T, T, head_dim) tensors; bias (heads, T, T)."""
    B, T, C = x.shape
    h, kv, d = attention.n_head, attention.n_kv_head, attention.head_dim
    q, k, v = attention.qkv(x).split((h * d, kv * d, kv * d), dim=-1)
    q = q.view(B, T, h, d)
    k, v = (y.view(B, T, kv, d).repeat_interleave(h // kv, dim=2) for y in (k, v))
    distance = (torch.arange(T) - torch.arange(T)[:, None]).clamp(-clip, clip) + clip  # j - i
    keys, values = k[:, None].expand(B, T, T, h, d), v[:, None].expand(B, T, T, h, d)  # of i, j
    if key_distance is not None:
        keys = keys + key_distance[distance][None, :, :, None]
    if value_distance is not None:
        values = values + value_distance[distance][None, :, :, None]
    score = torch.einsum("bihd,bijhd->bhij", q, keys) / math.sqrt(d)
    if bias is not None:
        score = score + bias
    if causal:
        score = score.masked_fill(torch.ones(T, T).triu(1).bool(), -torch.inf)
    y = torch.einsum("bhij,bijhd->bihd", score.softmax(-1), values)
    return attention.proj(y.reshape(B, T, C))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("n_kv_head", [4, 2, 1])
@pytest.mark.parametrize("clip", [1, 3, 40])
@pytest.mark.parametrize("shaw_values", [False, True])
@torch.no_grad()
def test_shaw_matches_reference(shaw_values, clip, n_kv_head, causal):
    settings = dict(position="shaw", shaw_values=shaw_values, shaw_clip=clip, n_kv_head=n_kv_head)
    model = tiny(**settings, causal=causal).double()
    attention, x = model.core.blocks[0].attn, torch.randn(2, 9, 16, dtype=torch.float64)
    attn = attn_inputs(model.config, tokens(2, 9))[1]
    values = attention.value_distance.weight if shaw_values else None
    expected = reference_attention(attention, x, None, attention.key_distance.weight, values, clip, causal)
    assert rel_error(attention(x, attn), expected) < 1e-12


def reference_slopes(n: int) -> list[float]:
    """The ALiBi paper's rule: geometric, and for other head counts every second of the next power of 2."""
    if n & (n - 1) == 0:
        return [2.0 ** (-8.0 / n * (i + 1)) for i in range(n)]
    power = 1 << (n.bit_length() - 1)
    return reference_slopes(power) + reference_slopes(2 * power)[0::2][: n - power]


def test_alibi_slopes():
    assert alibi_slopes(8).tolist() == [2.0**-i for i in range(1, 9)]
    expected = [2.0**-i for i in range(1, 9)] + [2.0 ** -(i + 0.5) for i in range(4)]
    assert alibi_slopes(12).tolist() == pytest.approx(expected)
    for n in range(1, 40):
        assert alibi_slopes(n).tolist() == pytest.approx(reference_slopes(n))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("n_head, n_kv_head", [(4, 2), (3, 1), (6, 6), (12, 4), (1, 1)])
@torch.no_grad()
def test_alibi_matches_reference(n_head, n_kv_head, causal):
    model = tiny(position="alibi", n_head=n_head, n_kv_head=n_kv_head, n_embd=24, causal=causal).double()
    attention, x = model.core.blocks[0].attn, torch.randn(2, 9, 24, dtype=torch.float64)
    bias = torch.tensor(
        [[[-s * abs(i - j) for j in range(9)] for i in range(9)] for s in reference_slopes(n_head)],
        dtype=torch.float64,
    )
    attn = attn_inputs(model.config, tokens(2, 9))[1]
    assert rel_error(attention(x, attn), reference_attention(attention, x, bias, causal=causal)) < 1e-7


@pytest.mark.parametrize("dim", [8, 16, 5])
def test_sinusoids_match_formula(dim):
    actual = sinusoids(torch.tensor([0, 1, 2, 77]), dim, 10000.0)
    for row, position in zip(actual, (0, 1, 2, 77), strict=True):
        for i in range(dim):
            even_dim = dim + dim % 2
            angle = position / 10000.0 ** (2 * (i // 2) / even_dim)
            expected = math.cos(angle) if i % 2 else math.sin(angle)
            assert row[i].item() == pytest.approx(expected, abs=1e-5)


@torch.no_grad()
def test_absolute_positions_are_added_to_the_tokens():
    for position in ("learned", "sinusoidal"):
        embedder = tiny(position=position).embedder
        idx, positions = tokens(2, 7), torch.arange(7) + 3
        table = embedder.positions.weight if position == "learned" else sinusoids(torch.arange(16), 16, 1e4)
        assert torch.equal(embedder(idx, positions), embedder.tokens.weight[idx] + table[positions])


@torch.no_grad()
def test_pointer_matches_formula():
    """The formula pair by pair, in float64, and the pointer's own loss in training."""
    model = tiny(pointer=True, softcap=5.0, pointer_loss=0.3).double()
    pointer, idx = model.pointer, tokens(1, 9) % 5  # the same token more than once
    pointer.sentinel.data.fill_(0.3)
    pointer.scale.data.fill_(1.7)
    positions, attn = attn_inputs(model.config, idx)
    x = model.core(model.embedder(idx, positions), attn)
    q, a, b = pointer.qab(pointer.norm(x))[0].chunk(3, dim=-1)
    vocab_probs, log_probs, own_losses = model.head(x)[0].softmax(-1), model(idx)[0][0], []
    targets = idx.roll(-1, dims=1)
    targets[0, 4] = -1
    for t in range(9):
        scores = {"sentinel": math.exp(0.3)}
        for s in range(t):
            k = a[s] + b[s + 1]
            rms = [(row.square().mean() + 1e-5).sqrt() for row in (q[t], k)]
            scores[s] = math.exp(1.7 * (q[t] / rms[0]) @ (k / rms[1]) / 4)  # 4: the root of n_embd = 16
        total = sum(scores.values())
        expected = vocab_probs[t] * scores.pop("sentinel") / total
        for s, score in scores.items():
            expected[idx[0, s + 1]] += score / total
        assert rel_error(log_probs[t].exp(), expected) < 1e-9
        assert abs(expected.sum() - 1) < 1e-9
        correct = [score for s, score in scores.items() if idx[0, s + 1] == targets[0, t]]
        own_losses += [math.log(sum(scores.values()) / sum(correct))] if correct else []
    assert 0 < len(own_losses) < 7
    loss = model.eval()(idx, targets)[1]
    assert abs(model.train()(idx, targets)[1] - loss - 0.3 * sum(own_losses) / 8) < 1e-9


@pytest.mark.parametrize("sentinel", [-300.0, 7.0, 300.0])
def test_pointer_loss_is_finite_when_exp_underflows(sentinel):
    """Plain and chunked losses and gradients agree, and none is nan."""
    results = []
    for loss_chunk in (0, 5):
        model, idx = tiny(pointer=True, loss_chunk=loss_chunk, pointer_loss=0.0), tokens(2, 12) % 9
        model.pointer.sentinel.data.fill_(sentinel)
        model.pointer.scale.data.fill_(15.0)
        loss = model(idx, idx.roll(-1, dims=1))[1]
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters())])
    assert results[0][0] > 87 or sentinel != -300.0
    for plain, chunked in zip(*results, strict=True):
        assert plain.isfinite().all() and torch.allclose(plain, chunked, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("loss_chunk", [0, 7])
def test_pointer_learns_to_copy(loss_chunk):
    """A random token occurs twice, after the same marker: predictable only by copying."""
    torch.manual_seed(0)
    model = tiny(pointer=True, n_layer=1, loss_chunk=loss_chunk)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(150):
        idx = torch.randint(V - 1, (16, 7))
        idx[:, 5], idx[:, 1] = V - 1, V - 1  # the marker
        idx[:, 6] = idx[:, 2]
        targets = torch.full((16, 6), -1)
        targets[:, 5] = idx[:, 6]
        loss = model(idx[:, :-1], targets)[1]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < 1.0 < math.log(V)


@pytest.mark.parametrize(
    "settings", [dict(causal=False), dict(label_smoothing=0.1), dict(z_loss=0.1)], ids=lambda s: next(iter(s))
)
def test_pointer_rejects_incompatible_settings(settings):
    with pytest.raises(ValueError, match="a pointer needs causal=True, label_smoothing=0 and z_loss=0"):
        tiny(pointer=True, **settings)


def test_bigram_init_matches_bigram_counts():
    """With n_embd > V it is the bigram model with a prior, up to the ridge term: counted in float64."""
    V, prior = 12, 20.0
    rng = torch.Generator().manual_seed(0)
    transitions = torch.rand(V, V, generator=rng).pow(8)
    ids = [0]
    for _ in range(4000):
        ids.append(torch.multinomial(transitions[ids[-1]], 1, generator=rng).item())
    ids = torch.tensor(ids)
    model = GPT(GPTConfig(vocab_size=V, n_layer=1, n_head=2, n_embd=16, tied=False, init="zero"))
    bigram_init(model, ids, prior)
    n = torch.zeros(V, V, dtype=torch.float64)
    for a, b in zip(ids[:-1].tolist(), ids[1:].tolist(), strict=True):
        n[a, b] += 1
    p = (torch.bincount(ids, minlength=V) + 0.5).double()
    p = p / p.sum()
    expected = ((n + prior * p) / (n.sum(1, keepdim=True) + prior)).log()
    actual = model(torch.arange(V)[:, None])[0][:, 0].double().log_softmax(-1)
    assert (actual - expected).abs().mean() < 0.05 < (p.log() - expected).abs().mean() / 10
    wide = GPT(GPTConfig(vocab_size=V, n_layer=1, n_head=2, n_embd=96, tied=False, init="zero"))
    bigram_init(wide, ids, prior)  # more dimensions than ids
    assert (wide(torch.arange(V)[:, None])[0][:, 0].log_softmax(-1) - expected).abs().mean() < 0.05
    before = [p.clone() for p in model.parameters()]
    bigram_init(model, ids, prior)  # bitwise deterministic
    assert all(torch.equal(p, q) for p, q in zip(before, model.parameters(), strict=True))


def test_bigram_init_needs_an_untied_head():
    model = GPT(GPTConfig(vocab_size=V, n_layer=1, n_head=2, n_embd=16, tied=True, init="zero"))
    before = model.head.linear.weight.clone()
    with pytest.raises(ValueError, match="tied=False"):
        bigram_init(model, torch.arange(20))
    assert torch.equal(model.head.linear.weight, before)


@pytest.mark.parametrize("name", [name for name in POSITION_SETTINGS if name != "none"])
@torch.no_grad()
def test_token_order_matters_only_with_positions(name):
    """Swapping two earlier tokens changes the last logits, but not with position="none"."""
    idx = tokens(1, 9)
    swapped = idx[:, [0, 1, 2, 3, 4, 7, 6, 5, 8]]
    assert idx[0, 5] != idx[0, 7]
    # one layer, because with two the causal mask alone distinguishes positions
    for position, differs in ((name, True), ("none", False)):
        model = tiny(n_layer=1, **POSITION_SETTINGS[position])
        assert (rel_error(model(swapped)[0][:, -1], model(idx)[0][:, -1]) > 1e-3) == differs


@pytest.mark.parametrize("name", ["rope", "alibi", "shaw", "shaw_values", "none"])
@torch.no_grad()
def test_relative_positions_are_translation_invariant(name):
    model, idx = tiny(**POSITION_SETTINGS[name], window=4, n_layer=1), tokens(1, 30)
    assert rel_error(model(idx)[0][:, 20:], model(idx[:, 13:])[0][:, 7:]) < 1e-5


# ----------------------------------------------------------------------------------------------------------
# Attention


def with_mask(model: GPT, idx, mask) -> AttnInputs:
    """attn_inputs with an explicit mask (B, T, T) instead of causal, window and segments."""
    attn, T = attn_inputs(model.config, idx)[1], idx.shape[1]
    bias = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)[:, None]
    distance = torch.arange(T)[:, None] - torch.arange(T)
    if model.config.position == "alibi":
        bias = bias - torch.tensor(reference_slopes(model.config.n_head))[:, None, None] * distance.abs()
    return AttnInputs(attn.rope, bias, False, distance)


@pytest.mark.parametrize("segmented", [False, True])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [0, 1, 4, 11, 12, 40])
@pytest.mark.parametrize("name", POSITION_SETTINGS)
@torch.no_grad()
def test_window_and_segments_match_explicit_mask(name, window, causal, segmented):
    model, idx = tiny(**POSITION_SETTINGS[name], window=window, causal=causal), tokens(2, 12)
    segments = torch.tensor([[0] * 5 + [1] * 7, [3] * 2 + [0] * 10])
    mask = torch.ones(2, 12, 12, dtype=torch.bool)
    for b, i, j in product(range(2), range(12), range(12)):
        mask[b, i, j] = not (causal and j > i) and not (window and abs(i - j) >= window)
        mask[b, i, j] &= not segmented or bool(segments[b, i] == segments[b, j])
    positions = torch.tensor([[*range(5), *range(7)], [0, 1, *range(10)]]) if segmented else torch.arange(12)
    x = model.embedder(idx, positions)
    expected = model.head(model.core(x, with_mask(model, idx, mask)))
    assert rel_error(model(idx, segments=segments if segmented else None)[0], expected) < 1e-5


@pytest.mark.parametrize("settings", [{}, dict(pointer=True)])
@pytest.mark.parametrize("name", POSITION_SETTINGS)
@torch.no_grad()
def test_segments_are_independent(name, settings):
    model, idx = tiny(**POSITION_SETTINGS[name], **settings), tokens(2, 12)
    segments = torch.tensor([0] * 5 + [1] * 7).expand(2, 12)
    expected = torch.cat((model(idx[:, :5])[0], model(idx[:, 5:])[0]), dim=1)
    assert rel_error(model(idx, segments=segments)[0], expected) < 1e-5


@pytest.mark.parametrize("settings", [{}, dict(window=4), dict(causal=False), dict(pointer=True)])
@pytest.mark.parametrize("name", POSITION_SETTINGS)
@torch.no_grad()
def test_separator_starts_a_segment(name, settings):
    """With config.separator the model derives the segments; those that are passed override it."""
    model, masked = (tiny(**POSITION_SETTINGS[name], **settings, separator=i) for i in (-1, 5))
    idx = tokens(2, 12)
    idx[0, 3] = idx[0, 4] = idx[1, 0] = idx[1, 7] = 5
    segments = (idx == 5).cumsum(dim=1)
    assert torch.equal(masked(idx)[0], model(idx, segments=segments)[0])
    assert torch.equal(masked(idx, idx)[1], model(idx, idx, segments=segments)[1])
    assert torch.equal(
        masked(idx, segments=torch.zeros_like(idx))[0], model(idx, segments=torch.zeros_like(idx))[0]
    )
    assert not torch.equal(masked(idx)[0], model(idx)[0])


@pytest.mark.parametrize("n_kv_head", [0, 2])
@pytest.mark.parametrize("window, causal", [(0, True), (5, True), (5, False)])
@torch.no_grad()
def test_flex_attention_matches_the_dense_mask(window, causal, n_kv_head):
    """The kernel for document masking on CUDA. Only the forward pass runs without a GPU."""
    model = tiny(separator=5, window=window, causal=causal, n_kv_head=n_kv_head, block_size=160)
    idx = tokens(2, 150)  # more than one block of 128 keys
    positions, attn = attn_inputs(model.config, idx)
    starts = torch.arange(150) - positions
    flex = attn._replace(attn_mask=None, kernel=flex_attention(model.config, starts))
    x = model.embedder(idx, positions)
    assert rel_error(model.core(x, flex), model.core(x, attn)) < 1e-5


@pytest.mark.parametrize("separator", [0, V - 1])
@torch.no_grad()
def test_any_id_can_be_the_separator(separator):
    model, masked = (tiny(separator=i) for i in (-1, separator))
    idx = tokens(1, 12)
    idx[0, 6] = separator
    segments = (idx == separator).cumsum(dim=1)
    assert torch.equal(masked(idx)[0], model(idx, segments=segments)[0])


@pytest.mark.parametrize("name", POSITION_SETTINGS)
@torch.no_grad()
def test_grouped_query_attention_matches_repeated_heads(name):
    multihead = tiny(**POSITION_SETTINGS[name], n_kv_head=4)
    assert multihead.config.estimate() == tiny(**POSITION_SETTINGS[name]).config.estimate()
    assert torch.equal(multihead(tokens(2, 12))[0], tiny(**POSITION_SETTINGS[name])(tokens(2, 12))[0])
    for n_kv_head in (1, 2):
        grouped = tiny(**POSITION_SETTINGS[name], n_kv_head=n_kv_head).double()
        full, state = tiny(**POSITION_SETTINGS[name]).double(), grouped.state_dict()
        for key in [key for key in state if key.endswith("qkv.weight")]:
            q, *others = state[key].view(-1, 4, 16).split((4, n_kv_head, n_kv_head))
            k, v = (heads.repeat_interleave(4 // n_kv_head, dim=0) for heads in others)
            state[key] = torch.cat((q, k, v)).flatten(0, 1)
        full.load_state_dict(state)
        assert rel_error(grouped(tokens(2, 12))[0], full(tokens(2, 12))[0]) < 1e-12


@torch.no_grad()
def test_qk_norm_bounds_the_scores():
    model, plain = tiny(qk_norm=True, position="none"), tiny(position="none")
    for m, bounded in ((model, True), (plain, False)):
        before = m(tokens(2, 12))[0]
        for block in m.core.blocks:
            block.attn.qkv.weight[:32] *= 50  # queries and keys
        assert (rel_error(m(tokens(2, 12))[0], before) < 1e-3) == bounded


# ----------------------------------------------------------------------------------------------------------
# Norms, MLP, weight sharing


@torch.no_grad()
def test_norms_match_formulas():
    x = torch.randn(3, 16, dtype=torch.float64)
    for settings in NORMS.values():
        block = tiny(**settings).double().core.blocks[0]
        expected = x
        if "norm" not in settings:
            expected = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * block.norm1.weight
        elif settings["norm"] == "layernorm":
            mean, var = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, unbiased=False)
            expected = (x - mean) / (var + 1e-5).sqrt() * block.norm1.weight + block.norm1.bias
        assert rel_error(block.norm1(x), expected) < 1e-12
    assert not list(Block(GPTConfig(**TINY, norm_weight=False)).norm1.parameters())
    assert Block(GPTConfig(**TINY, norm="layernorm")).norm1.bias is None


def gelu(x: float) -> float:
    return x * (1 + math.erf(x / math.sqrt(2))) / 2


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


ACTIVATIONS = {
    "swiglu": lambda x: x * sigmoid(x),
    "geglu": gelu,
    "gelu": gelu,
    "gelu_tanh": lambda x: x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2,
    "relu": lambda x: max(x, 0.0),
    "relu2": lambda x: max(x, 0.0) ** 2,
    "silu": lambda x: x * sigmoid(x),
    "tanh": math.tanh,
    "leaky_relu": lambda x: x if x > 0 else 0.01 * x,
}


@pytest.mark.parametrize("name", MLPS)
@torch.no_grad()
def test_mlp_matches_formula(name):
    def act(x):
        return torch.tensor([[ACTIVATIONS[name](v) for v in row] for row in x.tolist()], dtype=x.dtype)

    mlp, x = tiny(mlp=name, bias=True).double().core.blocks[0].mlp, torch.randn(5, 16, dtype=torch.float64)
    hidden = mlp.fc.weight @ x.T + mlp.fc.bias[:, None]
    if name in ("swiglu", "geglu"):
        gate, up = hidden.chunk(2)
        hidden = act(gate) * up
    else:
        hidden = act(hidden)
    assert rel_error(mlp(x), (mlp.proj.weight @ hidden + mlp.proj.bias[:, None]).T) < 1e-12


@torch.no_grad()
def test_shared_weights_match_copied_weights():
    """An unshared model with the shared weights copied into each layer has the same logits."""
    for share in CHOICES["share"]:
        shared, unshared = tiny(share=share, lora_rank=2), tiny()
        state = {}
        for i, block in enumerate(shared.core.blocks):
            for name, module in block.named_modules():
                weight = getattr(module, "weight", None)
                if isinstance(module, LoRA):
                    weight = module.base.weight + module.up.weight @ module.down.weight
                if weight is not None and not any(part in name for part in (".base", ".up", ".down")):
                    state[f"core.blocks.{i}.{name}.weight"] = weight
        unshared.load_state_dict(shared.state_dict() | state, strict=False)
        assert set(state) == {name for name, _ in unshared.core.named_parameters(prefix="core")}
        assert rel_error(shared(tokens(2, 12))[0], unshared(tokens(2, 12))[0]) < 1e-5


def test_shared_parameters_are_counted_once():
    block = dict(attn=16 * 48 + 16 * 16, mlp=3 * 16 * 64, norms=32)
    expected = {
        "none": 2 * sum(block.values()),
        "mlp": 2 * (block["attn"] + block["norms"]) + block["mlp"],
        "layers": sum(block.values()),
        "lora": block["attn"] + block["mlp"] + 2 * (32 + 3 * (16 + 48 + 16 + 16 + 16 + 128 + 64 + 16)),
    }
    for share, count in expected.items():
        model = GPT(GPTConfig(**TINY, share=share, lora_rank=3))
        counts = model.config.estimate()
        assert counts["parameters"] - counts["embedding_parameters"] == count
        check_counts(model)


def test_lora_starts_at_zero():
    torch.manual_seed(0)
    model, idx = GPT(GPTConfig(**TINY, share="lora")), tokens(2, 12)
    before = model(idx)[0]
    for name, p in model.named_parameters():
        if name.endswith("down.weight"):
            torch.nn.init.normal_(p)
    assert torch.equal(model(idx)[0], before)


@parametrize_settings([*PARTS, *OPTIONS[:2], POINTERS])
def test_counts(settings):
    for position in ({}, dict(position="learned"), dict(position="shaw", shaw_values=True)):
        check_counts(tiny(**settings | position))


def test_choices_match_the_tables():
    assert set(CHOICES["share"]) == {"none", *SHARES} and set(CHOICES["init"]) == set(INITS)
    for field, names in CHOICES.items():
        for name in names:
            GPT(GPTConfig(**{**TINY, field: name}))
