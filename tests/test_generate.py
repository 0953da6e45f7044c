"""nanostlm/generate.py: generation against full forward passes, samplers against references, text output."""

import copy
import itertools
import random
import re

import numpy as np
import pytest
import torch

from model import GPT, AttnInputs, GPTConfig, rope_table
from nanostlm import tokenizer
from nanostlm.fast_decoding import Int8Linear, column_major, compile_step, quantize, quantize_rows
from nanostlm.generate import (
    DEFAULTS,
    SAMPLERS,
    Story,
    chain,
    draw,
    generate,
    greedy,
    min_p,
    repetition_penalty,
    stop_string,
    stories,
    stream,
    temperature,
    top_k,
    top_p,
    write,
)
from nanostlm.variants import alibi_slopes

BYTE = tokenizer.get("byte")
EOT = BYTE.eot


def tiny(**settings) -> GPT:
    """A byte-level model with init="fan_in": its logits differ enough to expose errors."""
    torch.manual_seed(0)
    fields = dict(n_layer=2, n_head=4, n_embd=16, block_size=12, vocab_size=257, init="fan_in", tied=False)
    model = GPT(GPTConfig(**fields | settings)).eval()
    torch.nn.init.normal_(model.head.linear.weight, std=0.2)
    return model


# ----------------------------------------------------------------------------------------------------------
# stream() and generate(): token ids to token ids


@torch.no_grad()
def reference_logits(model: GPT, ids: list[int], context: int) -> torch.Tensor:
    """Logits of the token after ids, without a cache: each token sees `context` tokens, itself included."""
    c = model.config
    if c.separator >= 0:  # documents are separate
        ids = ids[max(i for i, token in enumerate(ids) if i == 0 or token == c.separator) :]
    positions = torch.arange(len(ids))
    distance = positions[:, None] - positions
    mask = torch.zeros(len(ids), len(ids)).masked_fill((distance < 0) | (distance >= context), -torch.inf)
    if c.position == "alibi":
        mask = mask - alibi_slopes(c.n_head)[:, None, None] * distance
    rope = rope_table(positions, c.head_dim, c.rope_theta) if c.position == "rope" else None
    idx, attn = torch.tensor([ids]), AttnInputs(rope, mask.expand(1, c.n_head, -1, -1), False, distance)
    x = model.core(model.embedder(idx, positions), attn)
    head = model.head if model.pointer is None else model.pointer(x, idx, attn).mixed_with(model.head)
    return head(x)[0, -1]


KINDS = {
    "rope": {},
    "grouped": dict(n_kv_head=2, qk_norm=True),
    "window": dict(window=5),
    "alibi": dict(position="alibi"),
    "alibi_window": dict(position="alibi", window=5, n_kv_head=1),
    "shaw": dict(position="shaw", shaw_values=True, shaw_clip=3),
    "none": dict(position="none", norm="layernorm", mlp="relu2", share="layers"),
    "learned": dict(position="learned", norm="layernorm", bias=True, mlp="gelu"),
    "sinusoidal": dict(position="sinusoidal"),
    "learned_window": dict(position="learned", window=5),
    "short": dict(position="learned", block_size=1),
    "pointer": dict(pointer=True),
    "pointer_alibi": dict(pointer=True, position="alibi", window=5),
    "masked": dict(separator=EOT, pointer=True),
    "masked_learned": dict(separator=EOT, position="learned", norm="layernorm", bias=True),
}
FAST = ("rope", "learned", "pointer", "masked")
COMPILED = [pytest.param(kind, marks=() if kind in FAST else pytest.mark.slow) for kind in KINDS]


def no_end(logits, history):
    """A sampler that excludes end-of-text, so that no row ends."""
    return logits.index_fill(-1, torch.tensor([EOT]), -torch.inf)


@pytest.mark.parametrize("kind", COMPILED)
@pytest.mark.filterwarnings("ignore:a prompt of")
def test_step_is_compiled_once(kind):
    torch._dynamo.reset()
    model, graphs = tiny(**KINDS[kind]), []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    step = compile_step(model, backend=backend)
    check_generation(model, step)
    assert len(graphs) == (model.config.block_size > 1)  # with block_size 1, every token is a prompt


LOW_PRECISION = {
    "grouped": dict(bias=True, norm="layernorm", n_kv_head=2),
    "pointer": dict(pointer=True),
    "shaw": dict(position="shaw", shaw_values=True, shaw_clip=3),
    "masked": dict(separator=EOT, pointer=True, n_kv_head=1),
}


@pytest.mark.parametrize("kind", LOW_PRECISION)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_compiled_step_of_one_row_computes_in_float32(dtype, kind):
    torch._dynamo.reset()
    model = tiny(tied=True, **LOW_PRECISION[kind]).to(getattr(torch, dtype))
    for part in model.modules():
        if getattr(part, "bias", None) is not None:
            torch.nn.init.normal_(part.bias)
    reference, ids, recorded = copy.deepcopy(model).float(), [EOT, *b"The dog"], []

    def record(logits, history):
        recorded.append(logits)
        return logits

    step = compile_step(model, backend="eager")
    new = generate(model, [ids[1:]], 30, [record, no_end, temperature(0)], eot=EOT, step=step)[0]
    atol = 1e-5 if dtype == "float32" else 0.05  # the cache rounds to bfloat16
    for i, logits in zip(new, recorded, strict=True):
        torch.testing.assert_close(logits[0], reference_logits(reference, ids, 12), rtol=0, atol=atol)
        ids.append(i)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore:a prompt of")
def test_generation_matches_full_forward_within_and_past_the_context(kind):
    check_generation(tiny(**KINDS[kind]))


def check_generation(model: GPT, compiled_step=None) -> None:
    c = model.config
    prompts = [[], list(b"abcde"), list(b"The dog"), list(b"longer than the context"), [1, 2, EOT, 3, 4]]
    contexts = [[EOT, *prompt[max(0, len(prompt) - c.block_size + 1) :]] for prompt in prompts]
    recorded = []

    def record(logits, history):
        assert logits.dtype == torch.float32 and logits.is_inference()
        recorded.append(logits)
        return logits

    new = generate(model, prompts, 40, [record, no_end, temperature(0)], eot=EOT, step=compiled_step)
    assert [len(ids) for ids in new] == [40] * len(prompts)
    for row, ids in enumerate(contexts):
        for step, i in enumerate(new[row]):
            if c.position in ("learned", "sinusoidal") and len(ids) > c.block_size:
                ids = ids[-max(1, c.block_size // 2) :]
            expected = reference_logits(model, ids, c.window or c.block_size)
            torch.testing.assert_close(recorded[step][row], expected, rtol=0, atol=1e-5)
            ids = [*ids, i]


def test_sampler_history_is_the_model_input():
    recorded = []

    def record(logits, history):
        recorded.append((logits.shape, history.tolist()))
        return logits

    new = generate(tiny(), [[1, 2], []], 3, [record, no_end], eot=EOT)
    assert [shape for shape, _ in recorded] == [(2, 257)] * 3
    assert recorded[2][1] == [[EOT, 1, 2, *new[0][:2]], [EOT, EOT, EOT, *new[1][:2]]]


def test_rows_have_independent_generators():
    model, prompt = tiny(n_embd=32), list(b"Once")
    sixteen = generate(model, [prompt] * 16, 60, chain(), eot=EOT, seed=5)
    assert len(set(map(tuple, sixteen))) == 16
    assert generate(model, [prompt], 60, chain(), eot=EOT, seed=5) == sixteen[:1]
    assert generate(model, [prompt] * 3, 60, chain(), eot=EOT, seed=5) == sixteen[:3]
    assert generate(model, [prompt], 60, chain(), eot=EOT, seed=6) != sixteen[:1]
    mixed = generate(model, [prompt, list(b"another"), prompt], 60, chain(), eot=EOT, seed=5)
    assert [mixed[0], mixed[2]] == [sixteen[0], sixteen[2]] and mixed[1] != sixteen[1]


@pytest.mark.parametrize("position", ["rope", "learned"])
def test_finished_rows_leave_the_batch_without_affecting_others(position):
    model, batch_sizes = tiny(position=position), []
    prompts = [list(b"abcdefgh"[:n]) for n in range(8)]

    def record_size(logits, history):
        batch_sizes.append(len(logits))
        return no_end(logits, history)

    def stop(ids):  # after 1, 3, 6, ... ids in row 0, 1, 2, ..., which its first id identifies
        return len(ids) == lengths[ids[0]]

    first = [ids[0] for ids in generate(model, prompts, 1, [no_end], eot=EOT, seed=2)]
    assert len(set(first)) == 8  # else choose another seed, so that the rows differ
    lengths = dict(zip(first, [1, 3, 6, 10, 15, 21, 28, 36], strict=True))
    full = generate(model, prompts, 36, [no_end], eot=EOT, seed=2)
    stopped = generate(model, prompts, 36, [record_size], eot=EOT, seed=2, stops=[stop])
    assert stopped == [ids[: lengths[ids[0]]] for ids in full]
    assert batch_sizes == [8] * 10 + [4] * 11 + [2] * 7 + [1] * 8


def test_compiled_step_keeps_the_batch_size():
    """A finished row stays in the batch, to avoid recompilation, and yields nothing more."""
    torch._dynamo.reset()
    model, prompts = tiny(), [[1], [2], [3]]
    expected = [
        ids[:n] for ids, n in zip(generate(model, prompts, 9, [no_end], eot=EOT), (9, 2, 1), strict=True)
    ]
    lengths = {ids[0]: len(ids) for ids in expected}
    assert len(lengths) == 3
    stops = [lambda ids: len(ids) == lengths[ids[0]]]
    step = compile_step(model, backend="eager")
    assert generate(model, prompts, 9, [no_end], eot=EOT, stops=stops, step=step) == expected


def test_end_of_text_ends_a_row_and_is_not_yielded():
    forced = iter([7, EOT])

    def force(logits, history):
        return torch.full_like(logits, -torch.inf).index_fill(-1, torch.tensor([next(forced)]), 0.0)

    assert list(stream(tiny(), [[]], 10, [force], eot=EOT)) == [[(0, 7)], []]


def test_column_major_keeps_the_values():
    model = tiny(tied=True)
    before, new = model.state_dict(), generate(model, [[1, 2], []], 30, eot=EOT)
    before = {name: weight.clone() for name, weight in before.items()}
    column_major(model)
    assert model.head.linear.weight is model.embedder.tokens.weight
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert model.core.blocks[0].attn.qkv.weight.stride() == (1, 48)
    assert generate(model, [[1, 2], []], 30, eot=EOT) == new


@pytest.mark.slow
def test_inductor_generates_the_same_ids():
    batches = [list(b"The dog")], [[1], [2]], [[], list(b"The dog")]  # the last ones are padded
    for settings in ({}, dict(pointer=True), dict(n_kv_head=2, bias=True)):
        model = tiny(**settings)
        samplers = [no_end, temperature(0)]
        expected = [generate(model, prompts, 20, samplers, eot=EOT) for prompts in batches]
        step = compile_step(model)
        assert [generate(model, prompts, 20, samplers, eot=EOT, step=step) for prompts in batches] == expected


def test_generate_edge_cases():
    model = tiny()
    assert generate(model, [], 5, eot=EOT) == []
    assert generate(model, [[1], []], 0, eot=EOT) == [[], []]
    with pytest.warns(UserWarning, match="its last 11 are used.*context of 12"):
        generate(model, [[1] * 12], 1, eot=EOT)
    model.train()
    steps = stream(model, [[1]], 5, eot=EOT)
    next(steps)
    assert not model.training
    steps.close()
    assert model.training and not torch.is_inference_mode_enabled()
    model.head.linear.weight.data.fill_(torch.nan)
    with pytest.raises(RuntimeError, match="not finite"):
        generate(model, [[1]], 5, eot=EOT)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_generate_in_16_bit_dtypes(dtype):
    for kind in ("rope", "shaw", "alibi", "learned"):
        new = generate(tiny(**KINDS[kind]).to(dtype), [[1, 2], [3]], 20, [no_end], eot=EOT)
        assert [len(ids) for ids in new] == [20, 20]
        if dtype == torch.bfloat16:
            with torch.autocast("cpu", dtype):
                assert len(generate(tiny(**KINDS[kind]), [[1, 2], [3]], 20, [no_end], eot=EOT)[0]) == 20


INT8_KINDS = KINDS | {  # 257 ids, padded to 320
    "tied": dict(tied=True),
    "lora": dict(share="lora", lora_rank=3, bias=True),
    "odd": dict(mlp_hidden=21),  # not divisible by 16: not quantized
}


@pytest.mark.parametrize("kind", INT8_KINDS)
@pytest.mark.filterwarnings("ignore:a prompt of")
def test_int8_is_close_to_float32(kind):
    model, ids = tiny(**INT8_KINDS[kind]), torch.randint(257, (1, 12), generator=torch.manual_seed(1))
    ids = ids[:, : model.config.block_size]
    expected, loss = model(ids)[0], model(ids, ids)[1]
    quantize(model)
    plain = [part for part in model.modules() if isinstance(part, torch.nn.Linear)]
    assert all(any(side % 16 for side in part.weight.shape) for part in plain)
    assert (len(plain) > 0) == (kind in ("alibi_window", "lora", "odd"))  # the first: 24 rows of q, k, v
    assert isinstance(model.head.linear, Int8Linear)
    int8, float32 = model(ids)[0], model(ids.expand(2, -1))[0][:1]  # with the int8 kernel, and in float32
    assert int8.shape == expected.shape and (ids.shape[1] == 1 or not torch.equal(int8, float32))
    for logits in (int8, float32):
        assert (logits - expected).norm() < 0.03 * expected.norm()
    assert (model(ids, ids)[1] - loss).abs() < 0.05
    blocks = model.core.blocks
    assert (blocks[0].mlp.proj is blocks[1].mlp.proj) == (kind == "none")  # of share="layers"
    new = generate(model, [[1, 2], [3]], 20, [no_end], eot=EOT)
    assert [len(ids) for ids in new] == [20, 20]


def test_quantization_error_is_at_most_half_a_step():
    weight = torch.randn(3, 16, generator=torch.manual_seed(0)) * torch.tensor([[1.0], [1000.0], [1e-3]])
    rows, scale = quantize_rows(weight)
    assert rows.dtype == torch.int8 and scale.shape == (3,) and (rows.abs().amax(1) == 127).all()
    assert ((rows * scale[:, None].float() - weight).abs() <= 0.51 * scale[:, None]).all()


@pytest.mark.parametrize("rows", [1, 16, 17])  # the int8 kernel takes up to 16
def test_int8_linear_adds_its_bias(rows):
    torch.manual_seed(0)
    linear, x = torch.nn.Linear(32, 16), torch.randn(rows, 32)
    torch.nn.init.normal_(linear.bias)
    expected = linear(x)
    assert (Int8Linear(linear)(x) - expected).norm() < 0.03 * expected.norm()


def test_int8_linear_with_a_row_of_zeros():
    linear = torch.nn.Linear(16, 2, bias=False)
    linear.weight.data[0] = 0
    assert Int8Linear(linear)(torch.ones(1, 16))[0, 0] == 0


@pytest.mark.parametrize("share", ["none", "mlp", "layers", "lora"])
def test_replaced_layers_keep_their_weights_and_sharing(share):
    model = tiny(tied=True, share=share, bias=True)
    before, names = dict(model.named_parameters()), list(model.state_dict())
    compile_step(model, backend="eager")
    after = dict(model.named_parameters())
    assert list(model.state_dict()) == names and after.keys() == before.keys()
    assert all(after[name] is before[name] for name in before)
    assert model.head.linear.weight is model.embedder.tokens.weight
    assert not any(type(layer) is torch.nn.Linear for layer in model.modules())
    first, second = model.core.blocks[0].mlp.proj, model.core.blocks[1].mlp.proj
    assert (first is second) == (share in ("mlp", "layers"))
    assert share != "lora" or first.base is second.base


# ----------------------------------------------------------------------------------------------------------
# Samplers


def probabilities(sampler, p, history=None) -> np.ndarray:
    logits = torch.tensor(np.log(p), dtype=torch.float32).reshape(-1, np.shape(p)[-1])
    history = torch.zeros(len(logits), 1, dtype=torch.int64) if history is None else torch.tensor(history)
    before = logits.clone()
    after = sampler(logits, history).softmax(-1).squeeze(0).numpy()
    assert torch.equal(logits, before)  # samplers do not modify their argument
    return after


@pytest.mark.parametrize(
    "sampler, p, expected",
    [
        (temperature(1), [0.5, 0.3, 0.2], [0.5, 0.3, 0.2]),
        (temperature(0.5), [0.5, 0.3, 0.2], np.array([25, 9, 4]) / 38),
        (temperature(0), [0.2, 0.4, 0.4], [0, 1, 0]),
        (temperature(1e-40), [0.2, 0.5, 0.3], [0, 1, 0]),
        (temperature(9.9e-6), [0.2, 0.5, 0.3], [0, 1, 0]),
        (temperature(1e-5), [0.2, 0.5, 0.3], [0, 1, 0]),
        (temperature(1e6), [0.2, 0.5, 0.3], [1 / 3, 1 / 3, 1 / 3]),
        (top_k(10**30), [0.2, 0.5, 0.3], [0.2, 0.5, 0.3]),
        (top_k(1), [0.2, 0.5, 0.3], [0, 1, 0]),
        (top_k(2), [0.2, 0.5, 0.3], [0, 0.625, 0.375]),
        (top_k(2), [0.25, 0.5, 0.25], [0.25, 0.5, 0.25]),  # tokens tied with the k-th stay
        (top_k(1), [0.4, 0.4, 0.2], [0.5, 0.5, 0]),
        (top_k(9), [0.2, 0.5, 0.3], [0.2, 0.5, 0.3]),
        (top_k(0), [0.2, 0.5, 0.3], [0.2, 0.5, 0.3]),
        (top_p(0), [0.2, 0.5, 0.3], [0, 1, 0]),
        (top_p(0.5), [0.2, 0.5, 0.3], [0, 1, 0]),  # the first token reaches 0.5
        (top_p(0.51), [0.2, 0.5, 0.3], [0, 0.625, 0.375]),
        (top_p(0.8), [0.2, 0.5, 0.3], [0, 0.625, 0.375]),
        (top_p(0.81), [0.2, 0.5, 0.3], [0.2, 0.5, 0.3]),
        (top_p(1), [0.2, 0.5, 0.3], [0.2, 0.5, 0.3]),
        (top_p(0.6), [0.25, 0.5, 0.25], [0.25, 0.5, 0.25]),  # tokens tied with the last stay
        (min_p(0), [0.2, 0.5, 0.3], [0.2, 0.5, 0.3]),
        (min_p(0.5), [0.2, 0.5, 0.3], [0, 0.625, 0.375]),
        (min_p(1), [0.4, 0.2, 0.4], [0.5, 0, 0.5]),
    ],
)
def test_samplers_on_small_examples(sampler, p, expected):
    assert_close(probabilities(sampler, p), expected)


def renormalized(p: np.ndarray) -> np.ndarray:
    return p / p.sum(-1, keepdims=True)


def assert_close(actual: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(actual, expected, atol=1e-6)


def reference_top_p(p: np.ndarray, threshold: float) -> np.ndarray:
    kept, mass = np.zeros_like(p), 0.0
    for i in np.argsort(-p, kind="stable"):
        if mass >= threshold:
            break
        kept[i] = p[i]
        mass += p[i]
    return renormalized(kept)


def test_samplers_match_references_on_large_vocabularies():
    rng = np.random.default_rng(0)
    for spread in (0.01, 1, 5):  # 0.01: top_p needs more than its first 256 tokens
        p = renormalized(np.exp(rng.normal(size=(3, 3000)) * spread))
        rank = np.argsort(np.argsort(-p))
        for k in (1, 7, 2999):
            assert_close(probabilities(top_k(k), p), renormalized(np.where(rank < k, p, 0)))
        for share in (0.1, 0.5, 0.95, 0.9999):
            expected = np.stack([reference_top_p(row, share) for row in p])
            actual = probabilities(top_p(share), p)
            assert_close(actual, expected)
            assert abs((actual > 0).sum() - (expected > 0).sum()) <= 6  # rounding
        for share in (0.01, 0.3):
            masked = np.where(p >= share * p.max(1, keepdims=True), p, 0)
            assert_close(probabilities(min_p(share), p), renormalized(masked))
        truncated = renormalized(np.where(rank < 50, p, 0))
        composed = probabilities(lambda x, h: top_p(0.9)(top_k(50)(x, h), h), p)
        assert_close(composed, np.stack([reference_top_p(row, 0.9) for row in truncated]))


def test_repetition_penalty():
    logits = torch.tensor([[2.0, -2.0, 1.0, -1.0, 4.0]])
    actual = repetition_penalty(2.0)(logits, torch.tensor([[4, 0, 1, 0, 4]]))
    # applied once to each token of the history, and not to end-of-text (4)
    assert actual.tolist() == [[1.0, -4.0, 1.0, -1.0, 4.0]]


def test_chain_selects_and_orders_samplers():
    assert chain(temperature=1, top_p=1) == []
    assert len(chain()) == sum(value != SAMPLERS[name][1] for name, value in DEFAULTS.items()) > 0
    assert "repetition_penalty" in chain(temperature=0.5, repetition_penalty=2)[0].__qualname__
    with pytest.raises(ValueError, match="no sampler topp"):
        chain(topp=0.5)


@pytest.mark.parametrize(
    "name, value",
    [
        ("temperature", -0.1),
        ("temperature", np.nan),
        ("temperature", np.inf),
        ("temperature", 1e308),
        ("temperature", -1e-9),
        ("top_k", -1),
        ("top_p", -0.1),
        ("top_p", 1.1),
        ("top_p", np.nan),
        ("min_p", 2),
        ("min_p", -1e-9),
        ("min_p", np.nan),
        ("repetition_penalty", 0),
        ("repetition_penalty", -1),
        ("repetition_penalty", 1e-4),
        ("repetition_penalty", 1e4),
        ("repetition_penalty", np.inf),
        ("repetition_penalty", np.nan),
    ],
)
def test_invalid_sampler_values_raise(name, value):
    with pytest.raises(ValueError, match=f"{name} must be .*, not {re.escape(str(value))}"):
        chain(**{name: value})


def test_draw_frequencies_match_probabilities():
    p, n = torch.tensor([0.4, 0.0, 0.3, 0.15, 0.1, 0.05, 0.0]), 20000
    rngs = [random.Random(f"1337 {row}") for row in range(n)]  # as `stream` makes them
    for _ in range(2):  # the first and the second step
        drawn = draw(p.log().expand(n, -1), rngs)
        assert drawn.shape == (n, 1)
        count = drawn.flatten().bincount(minlength=7).double()
        assert count[1] == count[6] == 0
        chi_square = ((count - n * p)[p > 0] ** 2 / (n * p)[p > 0]).sum()
        assert chi_square < 18.5, chi_square  # 4 degrees of freedom: 1 in 1000


@pytest.mark.parametrize("u, expected", [(0.0, 1), (0.4999, 1), (0.5, 3), (0.99999, 3), (1 - 2**-53, 3)])
def test_zero_probability_tokens_are_never_drawn(u, expected):
    class Fixed:
        def random(self):
            return u

    assert draw(torch.tensor([[0.0, 0.5, 0.0, 0.5, 0.0]]).log(), [Fixed()]).item() == expected


SAMPLER_SETTINGS = [
    dict(zip(("temperature", "top_k", "top_p", "min_p", "repetition_penalty"), values, strict=True))
    for values in itertools.product((0, 1e-5, 0.8, 1e6), (0, 2, 99), (0, 0.9, 1), (0, 0.5, 1), (1e-3, 1, 1e3))
]
V = 5
LOGITS = [
    [*[0.5] * i, value, *[0.5] * (V - 1 - i)]
    for value in (np.nan, np.inf, -np.inf, 3e38, -3e38)
    for i in range(V)
]
LOGITS += [[value] * V for value in (np.nan, np.inf, -np.inf, 3e38, -3e38, 0.0)]
LOGITS += [
    [np.nan, np.inf, -np.inf, 0, 1],
    [-np.inf, np.inf, -np.inf, -np.inf, np.inf],
    [np.nan, *[-np.inf] * 4],
    [*[-np.inf] * 4, 1.0],
    [3e38, -3e38, 3e38, -np.inf, 0],
]


@pytest.mark.parametrize("row", LOGITS, ids=str)
def test_extreme_logits_give_a_valid_token_or_an_error(row):
    """For all samplers: the id of a token with a finite logit, or one error for non-finite logits."""
    row, history = torch.tensor(row), torch.tensor([[4, 0, 1]] * 2)
    invalid = not row.amax().isfinite()  # NaN, inf, or all -inf
    chains = [
        chain(**values)
        for values in SAMPLER_SETTINGS
        if values["repetition_penalty"] == 1 or row.abs().max() < 1e38
    ]
    for samplers, other in itertools.product(chains, (row, torch.zeros(V))):
        logits = torch.stack((row, other))
        for sampler in samplers:
            logits = sampler(logits, history)
        for rngs in ([random.Random(0), random.Random(1)], None):
            if invalid:
                with pytest.raises(RuntimeError, match="^the logits are not finite: .*$"):
                    draw(logits, rngs)
            else:
                ids = draw(logits, rngs)
                assert ids.shape == (2, 1) and 0 <= ids.min() and ids.max() < V
                assert row[ids[0]] > -torch.inf
    if invalid:
        with pytest.raises(RuntimeError, match="not finite"):
            draw(greedy(row[None], history), None)


@pytest.mark.parametrize("t", [0, 1e-6, 0.8])
@pytest.mark.parametrize("value", [1e30, -1e30, np.nan, np.inf])
def test_vocabulary_padding_is_never_generated(value, t):
    model = tiny()  # 257 ids in 320 rows
    expected = generate(model, [[1], []], 20, chain(temperature=t), eot=EOT)
    model.head.linear.weight.data[257:] = value
    assert generate(model, [[1], []], 20, chain(temperature=t), eot=EOT) == expected
    assert max(map(max, filter(None, expected))) < 257


@pytest.mark.parametrize("t", [0, 0.8])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_generate_raises_when_logits_become_non_finite(value, t):
    model, steps = tiny(), []

    def spoil_fifth_step(logits, history):
        steps.append(len(history))
        return logits.index_fill(-1, torch.tensor([3]), value if len(steps) == 5 else 0.0)

    with pytest.raises(RuntimeError, match="not finite"):
        generate(model, [[1], []], 20, [no_end, spoil_fifth_step, *chain(temperature=t)], eot=EOT)
    assert len(steps) == 5


# ----------------------------------------------------------------------------------------------------------
# write() and stories(): text to text


def add_all(text: bytes, stop=(), per_token=1) -> list[str]:
    """The outputs of Story.add for each byte, and of Story.end."""
    story = Story(BYTE, stop)
    return [story.add(i) for i in text] + [story.end()]


def test_streaming_never_emits_incomplete_characters():
    text = "naïve 🎃, 日本 👩‍👩‍👧!"
    pieces = add_all(text.encode())
    assert "".join(pieces) == text
    assert [piece for piece in pieces if piece] == list(text)
    assert add_all("a🎃".encode()[:-1]) == ["a", "", "", "", ""]  # incomplete at the end: dropped
    assert "".join(add_all(b"a\xffb\xf0\x9fc")) == "a\ufffdb\ufffdc"  # not UTF-8: replaced


def test_possible_start_of_a_stop_string_is_held_back():
    assert add_all(b"The end. No", ["end."])[:8] == ["T", "h", "", "e ", "", "", "", ""]
    assert add_all(b"The ends", ["end."]) == ["T", "h", "", "e ", "", "", "", "ends", ""]
    assert add_all(b"an en", ["end."]) == [*"a", "n", " ", "", "", "en"]
    assert "".join(add_all(b"eenend.", ["end."])) == "een"
    assert "".join(add_all("a🎃b".encode(), ["🎃"]))[:1] == "a"


class ScriptedModel(torch.nn.Module):
    """A mock model that predicts the given ids in order, then end-of-text."""

    def __init__(self, ids, vocab_size):
        super().__init__()
        self.config = GPTConfig(n_layer=1, n_head=1, n_embd=2, vocab_size=vocab_size)
        self.weight, self.ids, self.at = torch.nn.Parameter(torch.zeros(1)), ids, 0

    def forward(self, idx, cache, segments=None, last=False):
        i, self.at = [*self.ids, self.config.vocab_size - 1][self.at], self.at + 1
        return torch.nn.functional.one_hot(torch.tensor([[i]]), self.config.vocab_size) * 100.0, None


def test_stop_strings_across_and_within_tokens():
    pieces = [b"Once", b" up", b"on a ti", b"me. ", b"The en", b"d. Mo", b"re"]
    tok = tokenizer.Tokenizer("bpe264", [*(bytes([b]) for b in range(256)), *pieces])
    script = [256 + i for i in range(len(pieces))]
    assert stories(ScriptedModel(script, 264), tok, "") == ["Once upon a time. The end. More"]
    cut = {
        "end.": "Once upon a time. The ",
        "ce": "On",
        "on a time": "Once up",
        "e": "Onc",
        "x": None,
        "More!": None,
    }
    for stop, expected in cut.items():
        model = ScriptedModel(script, 264)
        texts = stories(model, tok, "", stop=["no", stop])
        assert texts == [expected or "Once upon a time. The end. More"]
        stopped = stop_string(tok, stop)
        needed = next((n for n in range(1, 8) if stopped(script[:n])), 8)
        assert model.at == needed  # no token is generated after the stop string
    with pytest.raises(ValueError, match="must not be empty"):
        stories(ScriptedModel(script, 264), tok, "", stop=[""])


def test_stories_start_with_the_prompt_and_match_streaming():
    model = tiny(n_embd=32)
    texts = stories(model, BYTE, "Once ü", 5, 50, temperature=1.0, top_k=40, top_p=0.9, seed=3)
    assert len(texts) == 5 and all(text.startswith("Once ü") for text in texts)
    pieces = write(model, BYTE, ["Once ü"], 50, temperature=1.0, top_k=40, top_p=0.9, seed=3)
    assert "Once ü" + "".join(piece for _, piece in pieces) == texts[0]
    assert len(set(stories(model, BYTE, "", 4, 30, temperature=0))) == 1
