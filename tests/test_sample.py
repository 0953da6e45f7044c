"""sample.py: generation against full forwards, samplers against slow formulas, texts, the command line."""

import copy
import dataclasses
import io
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from conftest import ROOT

import sample
from model import GPT, AttnInputs, GPTConfig, rope_table
from nanostlm import checkpoint, tokenizer
from nanostlm.variants import alibi_slopes
from sample import Story, generate, stories, stream

BYTE = tokenizer.get("byte")
EOT = BYTE.eot


def tiny(**settings) -> GPT:
    """A model whose logits differ enough for mistakes to show (fan_in), with the byte tokenizer's ids."""
    torch.manual_seed(0)
    fields = dict(n_layer=2, n_head=4, n_embd=16, block_size=12, vocab_size=257, init="fan_in", tied=False)
    model = GPT(GPTConfig(**fields | settings)).eval()
    torch.nn.init.normal_(model.head.linear.weight, std=0.2)
    return model


# ----------------------------------------------------------------------------------------------------------
# From ids to ids


@torch.no_grad()
def slow_logits(model: GPT, ids: list[int], context: int) -> torch.Tensor:
    """Of the token after ids, without a cache: every token sees the `context` tokens up to itself."""
    c, position = model.config, torch.arange(len(ids))
    distance = position[:, None] - position
    bias = torch.zeros(len(ids), len(ids)).masked_fill((distance < 0) | (distance >= context), -torch.inf)
    if c.position == "alibi":
        bias = bias - alibi_slopes(c.n_head)[:, None, None] * distance
    rope = rope_table(position, c.head_dim, c.rope_theta) if c.position == "rope" else None
    bias = bias.expand(1, c.n_head, -1, -1)
    idx, place = torch.tensor([ids]), AttnInputs(rope, bias, False, distance)
    x = model.core(model.embedder(idx, position), place)
    logits = model.head(x)
    return (logits if model.pointer is None else model.pointer(x, idx, place).mix(logits))[0, -1]


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
}
COMPILED = [pytest.param(kind, marks=() if kind in ("rope", "learned", "pointer") else pytest.mark.slow)
            for kind in KINDS]  # fmt: skip


def no_end(logits, history):
    """A sampler that rules out end-of-text, so that every row goes on."""
    return logits.index_fill(-1, torch.tensor([EOT]), -torch.inf)


@pytest.mark.parametrize("kind", COMPILED)
@pytest.mark.filterwarnings("ignore:a prompt of")
def test_one_compiled_step_does_for_every_token(kind):
    torch._dynamo.reset()
    model, graphs = tiny(**KINDS[kind]), []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    sample.compile_step(model, backend=backend)
    check_generation(model)
    assert len(graphs) == (model.config.block_size > 1)  # 1: every token is a prompt


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_compiled_step_of_one_row_reckons_in_float32(dtype):
    torch._dynamo.reset()
    model = tiny(tied=True, bias=True, norm="layernorm", n_kv_head=2).to(getattr(torch, dtype))
    for part in model.modules():
        if getattr(part, "bias", None) is not None:
            torch.nn.init.normal_(part.bias)
    exact, ids, recorded = copy.deepcopy(model).float(), [EOT, *b"The dog"], []

    def record(logits, history):
        recorded.append(logits)
        return logits

    sample.compile_step(model, backend="eager")
    new = generate(model, [ids[1:]], 30, [record, no_end, sample.temperature(0)], eot=EOT)[0]
    for i, logits in zip(new, recorded, strict=True):  # what the cache keeps is rounded
        torch.testing.assert_close(logits[0], slow_logits(exact, ids, 12), rtol=0,
                                   atol=1e-5 if dtype == "float32" else 0.05)  # fmt: skip
        ids.append(i)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore:a prompt of")
def test_generation_equals_the_full_forward_within_and_past_the_context(kind):
    check_generation(tiny(**KINDS[kind]))


def check_generation(model: GPT) -> None:
    c = model.config
    prompts = [[], list(b"abcde"), list(b"The dog"), list(b"longer than the context")]
    fed = [[EOT, *prompt[max(0, len(prompt) - c.block_size + 1) :]] for prompt in prompts]
    recorded = []

    def record(logits, history):
        assert logits.dtype == torch.float32 and logits.is_inference()
        recorded.append(logits)
        return logits

    new = generate(model, prompts, 40, [record, no_end, sample.temperature(0)], eot=EOT)
    assert [len(ids) for ids in new] == [40] * 4
    for row, ids in enumerate(fed):
        for step, i in enumerate(new[row]):
            if c.position in ("learned", "sinusoidal") and len(ids) > c.block_size:
                ids = ids[-max(1, c.block_size // 2) :]
            want = slow_logits(model, ids, c.window or c.block_size)
            torch.testing.assert_close(recorded[step][row], want, rtol=0, atol=1e-5)
            ids = [*ids, i]


def test_what_samplers_see_is_what_the_model_was_fed():
    seen = []

    def record(logits, history):
        seen.append((logits.shape, history.tolist()))
        return logits

    new = generate(tiny(), [[1, 2], []], 3, [record, no_end], eot=EOT)
    assert [shape for shape, _ in seen] == [(2, 257)] * 3
    assert seen[2][1] == [[EOT, 1, 2, *new[0][:2]], [EOT, EOT, EOT, *new[1][:2]]]


def test_a_row_draws_from_its_own_generator():
    model, prompt = tiny(n_embd=32), list(b"Once")
    sixteen = generate(model, [prompt] * 16, 60, sample.chain(), eot=EOT, seed=5)
    assert len(set(map(tuple, sixteen))) == 16
    assert generate(model, [prompt], 60, sample.chain(), eot=EOT, seed=5) == sixteen[:1]
    assert generate(model, [prompt] * 3, 60, sample.chain(), eot=EOT, seed=5) == sixteen[:3]
    assert generate(model, [prompt], 60, sample.chain(), eot=EOT, seed=6) != sixteen[:1]
    mixed = generate(model, [prompt, list(b"another"), prompt], 60, sample.chain(), eot=EOT, seed=5)
    assert [mixed[0], mixed[2]] == [sixteen[0], sixteen[2]] and mixed[1] != sixteen[1]


@pytest.mark.parametrize("position", ["rope", "learned"])
def test_rows_that_end_leave_the_batch_and_change_nothing(position):
    model, size = tiny(position=position), []
    prompts = [list(b"abcdefgh"[:n]) for n in range(8)]

    def watch(logits, history):
        size.append(len(logits))
        return no_end(logits, history)

    def stop(ids):  # row by row after 1, 3, 6, ... ids; told apart by the first
        return len(ids) == lengths[ids[0]]

    first = [ids[0] for ids in generate(model, prompts, 1, [no_end], eot=EOT, seed=2)]
    assert len(set(first)) == 8  # or the test could not tell them apart: take another seed
    lengths = dict(zip(first, [1, 3, 6, 10, 15, 21, 28, 36], strict=True))
    whole = generate(model, prompts, 36, [no_end], eot=EOT, seed=2)
    cut = generate(model, prompts, 36, [watch], eot=EOT, seed=2, stops=[stop])
    assert cut == [ids[: lengths[ids[0]]] for ids in whole]
    assert size == [8] * 10 + [4] * 11 + [2] * 7 + [1] * 8


def test_end_of_text_ends_a_row_and_is_not_given():
    forced = iter([7, EOT])

    def force(logits, history):
        return torch.full_like(logits, -torch.inf).index_fill(-1, torch.tensor([next(forced)]), 0.0)

    assert list(stream(tiny(), [[]], 10, [force], eot=EOT)) == [[(0, 7)], []]


def test_laying_out_changes_no_number():
    model = tiny(tied=True)
    before, new = model.state_dict(), generate(model, [[1, 2], []], 30, eot=EOT)
    before = {name: weight.clone() for name, weight in before.items()}
    sample.lay_out(model)
    assert model.head.linear.weight is model.embedder.tokens.weight
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert model.core.blocks[0].attn.qkv.weight.stride() == (1, 48)
    assert generate(model, [[1, 2], []], 30, eot=EOT) == new


@pytest.mark.slow
def test_the_step_compiled_by_inductor_says_the_same():
    batches = [list(b"The dog")], [[1], [2]], [[], list(b"The dog")]  # the last ones are padded
    for settings in ({}, dict(pointer=True), dict(n_kv_head=2, bias=True)):
        model = tiny(**settings)
        samplers = [no_end, sample.temperature(0)]
        want = [generate(model, prompts, 20, samplers, eot=EOT) for prompts in batches]
        sample.compile_step(model)
        assert [generate(model, prompts, 20, samplers, eot=EOT) for prompts in batches] == want


def test_edges():
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
def test_other_dtypes(dtype):
    for kind in ("rope", "shaw", "alibi", "learned"):
        new = generate(tiny(**KINDS[kind]).to(dtype), [[1, 2], [3]], 20, [no_end], eot=EOT)
        assert [len(ids) for ids in new] == [20, 20]
        if dtype == torch.bfloat16:
            with torch.autocast("cpu", dtype):  # as train.py does for its closing stories
                assert len(generate(tiny(**KINDS[kind]), [[1, 2], [3]], 20, [no_end], eot=EOT)[0]) == 20


INT8_KINDS = KINDS | {  # 257 ids, padded to 320
    "tied": dict(tied=True),
    "lora": dict(share="lora", lora_rank=3, bias=True),
    "odd": dict(mlp_hidden=21),  # such layers stay
}


@pytest.mark.parametrize("kind", INT8_KINDS)
def test_weights_of_8_bits_say_nearly_the_same(kind):
    model, ids = tiny(**INT8_KINDS[kind]), torch.randint(257, (1, 12), generator=torch.manual_seed(1))
    ids = ids[:, : model.config.block_size]
    want, loss = model(ids)[0], model(ids, ids)[1]
    sample.quantize(model)
    kept = [part for part in model.modules() if isinstance(part, torch.nn.Linear)]
    assert all(any(side % 16 for side in part.weight.shape) for part in kept)
    assert (len(kept) > 0) == (kind in ("alibi_window", "lora", "odd"))  # the first: 24 rows of q, k, v
    assert isinstance(model.head.linear, sample.Int8Linear)
    few, many = model(ids)[0], model(ids.expand(2, -1))[0][:1]  # by the kernel, and with floats
    assert few.shape == want.shape and (ids.shape[1] == 1 or not torch.equal(few, many))
    for logits in (few, many):
        assert (logits - want).norm() < 0.03 * want.norm()
    assert (model(ids, ids)[1] - loss).abs() < 0.05
    blocks = model.core.blocks
    assert (blocks[0].mlp.proj is blocks[1].mlp.proj) == (kind == "none")  # of share="layers"
    new = generate(model, [[1, 2], [3]], 20, [no_end], eot=EOT)
    assert [len(ids) for ids in new] == [20, 20]


def test_weights_of_8_bits_where_a_row_is_zero():
    linear = torch.nn.Linear(16, 2, bias=False)
    linear.weight.data[0] = 0
    assert sample.Int8Linear(linear)(torch.ones(1, 16))[0, 0] == 0


# ----------------------------------------------------------------------------------------------------------
# Samplers


def probabilities(sampler, p, history=None) -> np.ndarray:
    logits = torch.tensor(np.log(p), dtype=torch.float32).reshape(-1, np.shape(p)[-1])
    history = torch.zeros(len(logits), 1, dtype=torch.int64) if history is None else torch.tensor(history)
    before = logits.clone()
    after = sampler(logits, history).softmax(-1).squeeze(0).numpy()
    assert torch.equal(logits, before)  # a sampler makes new logits
    return after


@pytest.mark.parametrize(
    "sampler, p, want",
    [
        (sample.temperature(1), [0.5, 0.3, 0.2], [0.5, 0.3, 0.2]),
        (sample.temperature(0.5), [0.5, 0.3, 0.2], np.array([25, 9, 4]) / 38),
        (sample.temperature(0), [0.2, 0.4, 0.4], [0, 1, 0]),
        (sample.temperature(1e-40), [0.2, 0.5, 0.3], [0, 1, 0]),
        (sample.top_k(1), [0.2, 0.5, 0.3], [0, 1, 0]),
        (sample.top_k(2), [0.2, 0.5, 0.3], [0, 0.625, 0.375]),
        (sample.top_k(2), [0.25, 0.5, 0.25], [0.25, 0.5, 0.25]),  # ties with the k-th stay
        (sample.top_k(1), [0.4, 0.4, 0.2], [0.5, 0.5, 0]),
        (sample.top_k(9), [0.2, 0.5, 0.3], [0.2, 0.5, 0.3]),
        (sample.top_k(0), [0.2, 0.5, 0.3], [0.2, 0.5, 0.3]),
        (sample.top_p(0), [0.2, 0.5, 0.3], [0, 1, 0]),
        (sample.top_p(0.5), [0.2, 0.5, 0.3], [0, 1, 0]),  # 0.5 is enough
        (sample.top_p(0.51), [0.2, 0.5, 0.3], [0, 0.625, 0.375]),
        (sample.top_p(0.8), [0.2, 0.5, 0.3], [0, 0.625, 0.375]),
        (sample.top_p(0.81), [0.2, 0.5, 0.3], [0.2, 0.5, 0.3]),
        (sample.top_p(1), [0.2, 0.5, 0.3], [0.2, 0.5, 0.3]),
        (sample.top_p(0.6), [0.25, 0.5, 0.25], [0.25, 0.5, 0.25]),  # ties with the last stay
        (sample.min_p(0), [0.2, 0.5, 0.3], [0.2, 0.5, 0.3]),
        (sample.min_p(0.5), [0.2, 0.5, 0.3], [0, 0.625, 0.375]),
        (sample.min_p(1), [0.4, 0.2, 0.4], [0.5, 0, 0.5]),
    ],
)
def test_samplers_by_hand(sampler, p, want):
    same(probabilities(sampler, p), want)


def renormalized(p: np.ndarray) -> np.ndarray:
    return p / p.sum(-1, keepdims=True)


def same(got: np.ndarray, want: np.ndarray) -> None:
    np.testing.assert_allclose(got, want, atol=1e-6)


def slow_top_p(p: np.ndarray, enough: float) -> np.ndarray:
    kept, total = np.zeros_like(p), 0.0
    for i in np.argsort(-p, kind="stable"):
        if total >= enough:
            break
        kept[i] = p[i]
        total += p[i]
    return renormalized(kept)


def test_samplers_over_many_tokens_against_slow_formulas():
    random = np.random.default_rng(0)
    for spread in (0.01, 1, 5):  # nearly flat: the first guess of top_p is too short
        p = renormalized(np.exp(random.normal(size=(3, 3000)) * spread))
        rank = np.argsort(np.argsort(-p))
        for k in (1, 7, 2999):
            same(probabilities(sample.top_k(k), p), renormalized(np.where(rank < k, p, 0)))
        for share in (0.1, 0.5, 0.95, 0.9999):
            want, got = np.stack([slow_top_p(row, share) for row in p]), probabilities(sample.top_p(share), p)
            same(got, want)
            assert abs((got > 0).sum() - (want > 0).sum()) <= 6  # but for rounding
        for share in (0.01, 0.3):
            kept = np.where(p >= share * p.max(1, keepdims=True), p, 0)
            same(probabilities(sample.min_p(share), p), renormalized(kept))
        few = renormalized(np.where(rank < 50, p, 0))
        composed = probabilities(lambda x, h: sample.top_p(0.9)(sample.top_k(50)(x, h), h), p)
        same(composed, np.stack([slow_top_p(row, 0.9) for row in few]))


def test_repetition_penalty():
    logits = torch.tensor([[2.0, -2.0, 1.0, -1.0, 4.0]])
    got = sample.repetition_penalty(2.0)(logits, torch.tensor([[4, 0, 1, 0, 4]]))
    assert got.tolist() == [
        [1.0, -4.0, 1.0, -1.0, 4.0]
    ]  # once, however often it was said; not end-of-text (4)


def test_chain_orders_what_is_on():
    assert sample.chain(temperature=1, top_p=1) == []
    assert len(sample.chain()) == len(sample.DEFAULTS)
    assert "repetition_penalty" in sample.chain(temperature=0.5, repetition_penalty=2)[0].__qualname__
    with pytest.raises(ValueError, match="no sampler topp"):
        sample.chain(topp=0.5)


@pytest.mark.parametrize(
    "name, value",
    [("temperature", -0.1), ("temperature", np.nan), ("temperature", np.inf), ("top_k", -1), ("top_p", -0.1),
     ("top_p", 1.1), ("top_p", np.nan), ("min_p", 2), ("repetition_penalty", 0)],
)  # fmt: skip
def test_samplers_refuse(name, value):
    with pytest.raises(ValueError, match=f"{name} must be .*, not {value}"):
        sample.chain(**{name: value})


def test_frequencies_of_draws_are_the_probabilities():
    p, n = torch.tensor([0.4, 0.0, 0.3, 0.15, 0.1, 0.05, 0.0]), 20000
    chance = [sample.random.Random(f"1337 {row}") for row in range(n)]  # as n rows would at their first step
    for _ in range(2):  # and at their second
        drawn = sample.draw(p.log().expand(n, -1), chance)
        assert drawn.shape == (n, 1)
        count = drawn.flatten().bincount(minlength=7).double()
        assert count[1] == count[6] == 0
        chi = ((count - n * p)[p > 0] ** 2 / (n * p)[p > 0]).sum()
        assert chi < 18.5, chi  # 4 degrees of freedom: 1 in 1000


@pytest.mark.parametrize("u, want", [(0.0, 1), (0.4999, 1), (0.5, 3), (0.99999, 3), (1 - 2**-53, 3)])
def test_what_has_no_probability_is_never_drawn(u, want):
    class Fixed:
        def random(self):
            return u

    assert sample.draw(torch.tensor([[0.0, 0.5, 0.0, 0.5, 0.0]]).log(), [Fixed()]).item() == want


# ----------------------------------------------------------------------------------------------------------
# From text to text


def show(text: bytes, stop=(), per_token=1) -> list[str]:
    """What a Story shows after each byte, and at the end."""
    story = Story(BYTE, stop)
    return [story.add(i) for i in text] + [story.end()]


def test_streaming_never_shows_half_a_character():
    text = "naïve 🎃, 日本 👩‍👩‍👧!"
    shown = show(text.encode())
    assert "".join(shown) == text
    assert [piece for piece in shown if piece] == list(text)
    assert show("a🎃".encode()[:-1]) == [
        "a",
        "",
        "",
        "",
        "",
    ]  # the unfinished one at the very end is left out
    assert "".join(show(b"a\xffb\xf0\x9fc")) == "a\ufffdb\ufffdc"  # what can be no character is shown as such


def test_stop_strings_hold_back_what_may_begin_one():
    assert show(b"The end. No", ["end."])[:8] == ["T", "h", "", "e ", "", "", "", ""]
    assert show(b"The ends", ["end."]) == ["T", "h", "", "e ", "", "", "", "ends", ""]
    assert show(b"an en", ["end."]) == [*"a", "n", " ", "", "", "en"]
    assert "".join(show(b"eenend.", ["end."])) == "een"
    assert "".join(show("a🎃b".encode(), ["🎃"]))[:1] == "a"


class Script(torch.nn.Module):
    """Stands in for a model: says the ids of a script, one after the other, then end-of-text."""

    def __init__(self, ids, vocab_size):
        super().__init__()
        self.config = GPTConfig(n_layer=1, n_head=1, n_embd=2, vocab_size=vocab_size)
        self.weight, self.ids, self.at = torch.nn.Parameter(torch.zeros(1)), ids, 0

    def forward(self, idx, cache, last=False):
        i, self.at = [*self.ids, self.config.vocab_size - 1][self.at], self.at + 1
        return torch.nn.functional.one_hot(torch.tensor([[i]]), self.config.vocab_size) * 100.0, None


def test_stop_strings_across_tokens_and_inside_one():
    pieces = [b"Once", b" up", b"on a ti", b"me. ", b"The en", b"d. Mo", b"re"]
    words = tokenizer.Tokenizer("bpe264", [*(bytes([b]) for b in range(256)), *pieces])
    script = [256 + i for i in range(len(pieces))]
    assert stories(Script(script, 264), words, "") == ["Once upon a time. The end. More"]
    cut = {
        "end.": "Once upon a time. The ",
        "ce": "On",
        "on a time": "Once up",
        "e": "Onc",
        "x": None,
        "More!": None,
    }
    for stop, want in cut.items():
        model = Script(script, 264)
        got = stories(model, words, "", stop=["no", stop])
        assert got == [want or "Once upon a time. The end. More"]
        ended = sample.stop_string(words, stop)
        spent = next((n for n in range(1, 8) if ended(script[:n])), 8)
        assert model.at == spent  # not a token more than it took
    with pytest.raises(ValueError, match="must not be empty"):
        stories(Script(script, 264), words, "", stop=[""])


def test_stories_begin_with_the_prompt_and_equal_what_is_streamed():
    model = tiny(n_embd=32)
    texts = stories(model, BYTE, "Once ü", 5, 50, temperature=1.0, top_k=40, top_p=0.9, seed=3)
    assert len(texts) == 5 and all(text.startswith("Once ü") for text in texts)
    pieces = sample.write(model, BYTE, ["Once ü"], 50, temperature=1.0, top_k=40, top_p=0.9, seed=3)
    assert "Once ü" + "".join(piece for _, piece in pieces) == texts[0]
    assert len(set(stories(model, BYTE, "", 4, 30, temperature=0))) == 1


# ----------------------------------------------------------------------------------------------------------
# The command line


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with two runs: out/old, out/new."""
    folder = tmp_path_factory.mktemp("runs")
    for name, age in (("new", 0), ("old", 100)):
        model, path = tiny(n_embd=32), folder / "out" / name / "best.pt"
        path.parent.mkdir(parents=True)
        state = {"model": model.state_dict(), "model_config": dataclasses.asdict(model.config)}
        checkpoint.save(path, state | {"tokenizer": BYTE.state()})
        os.utime(path, (time.time() - age,) * 2)
    return folder


@pytest.fixture
def main(runs, monkeypatch, capsys):
    """sample.main in that folder: arguments -> (status, stdout, stderr)."""
    monkeypatch.chdir(runs)
    monkeypatch.setattr("warnings.formatwarning", sample.warnings.formatwarning)  # put back afterwards

    def call(*arguments):
        status = sample.main(["--device", "cpu", *map(str, arguments)])
        return status, *capsys.readouterr()

    return call


def command(*arguments) -> list[str]:
    return [sys.executable, str(ROOT / "sample.py"), "--device", "cpu", *arguments]


def test_the_command_line_in_a_process_of_its_own(runs):
    prompt = "ü" * 10
    line = command("--prompt", prompt, "--max_new_tokens", "30")
    done = subprocess.run(line, cwd=runs, capture_output=True)
    lines = done.stderr.decode().splitlines()
    assert done.returncode == 0
    assert done.stdout.decode().startswith(prompt) and len(done.stdout) > 25 and done.stdout.endswith(b"\n")
    assert lines[0].replace("\\", "/").startswith("out/new/best.pt: 0.0M parameters, byte, float32 on cpu")
    assert lines[1].startswith("note: a prompt of 20 tokens is too long: ")
    assert lines[2].endswith(" tokens/s") and len(lines) == 3


def test_samples_are_separated_and_the_first_is_what_one_would_be(main):
    status, one, _ = main("--prompt", "Once", "--max_new_tokens", 20)
    assert status == 0 and one.startswith("Once") and one.endswith("\n") and "---" not in one
    assert main("--prompt", "Once", "--max_new_tokens", 20)[1] == one  # the same command, the same text
    status, three, err = main("--prompt", "Once", "--max_new_tokens", 20, "--num_samples", 3)
    texts = three.removesuffix("\n").split("\n---------------\n")
    assert len(texts) == 3 and all(text.startswith("Once") for text in texts)
    assert texts[0] + "\n" == one and "60 tokens in" in err
    assert main("--prompt", "Once", "--max_new_tokens", 20, "--seed", 8)[1] != one


@pytest.mark.filterwarnings("ignore:a prompt of")
def test_where_prompts_and_runs_come_from(main, runs, tmp_path, monkeypatch):
    (tmp_path / "prompt.txt").write_bytes("Zwölf\nBären\n".encode())
    greedy = ("--max_new_tokens", 5, "--temperature", 0)
    want = main("--prompt", "Zwölf\nBären", *greedy)[1]
    assert want.startswith("Zwölf\nBären") and len(want) > 12
    assert main("--prompt", f"FILE:{tmp_path / 'prompt.txt'}", *greedy)[1] == want
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("Zwölf\nBären\n".encode())))
    assert main("--prompt", "-", *greedy)[1] == want
    for place in (runs / "out" / "old", runs / "out" / "new" / "best.pt"):
        assert main("--out_dir", place, "--prompt", "Zwölf\nBären", *greedy)[1] == want
    assert "old" in main("--out_dir", runs / "out" / "old", *greedy)[2]
    for empty in ([], ["--prompt", ""], ["--prompt="]):
        status, out, _ = main(*empty, "--max_new_tokens", 9)
        assert status == 0 and len(out) > 1
    others = ("--top_k", 5, "--min_p", 0.1, "--repetition_penalty", 1.3)
    assert main("--dtype", "bfloat16", *others, *greedy)[0] == 0
    status, out, err = main("--dtype", "int8", "--num_samples", 2, *greedy)
    assert status == 0 and len(out) > 20 and "0.0M parameters, byte, int8 on cpu" in err
    whole = main("--max_new_tokens", 30)[1]
    char = next(char for char in whole[5:] if " " < char < "~")
    want = whole[: whole.index(char)].rstrip("\ufffd")  # half a character before it, too
    assert main("--max_new_tokens", 30, "--stop", "never", "--stop", char)[1] == want + "\n"


@pytest.mark.parametrize(
    "arguments, words",
    [
        ("--temperature -1", "temperature must be 0"),
        ("--top_p 1.5", "top_p must be between 0 and 1, not 1.5"),
        ("--top_k -3", "top_k"),
        ("--top_k many", "--top_k"),
        ("--num_samples 0", "num_samples must be 1 or more"),
        ("--max_new_tokens -5", "max_new_tokens must be 1 or more"),
        ("--temprature 1", "there is no --temprature; did you mean --temperature?"),
        ("--zzz", "there is no --zzz; see python sample.py --help"),
        ("--dtype int4", "--dtype"),
        ("--dtype int8 --device meta", "--dtype int8 needs --device cpu"),
        ("--device teapot", "no device teapot"),
        ("--stop=", "must not be empty"),
        ("--out_dir nowhere", "nowhere"),
        ("--out_dir empty", "empty holds no checkpoint"),
        ("--out_dir broken.pt", "broken.pt is damaged"),
        ("--prompt FILE:nowhere.txt", "FILE:nowhere.txt: No such file"),
        ("--prompt FILE:latin1.txt", "FILE:latin1.txt is not UTF-8"),
        ("--prompt \udcff", "not valid Unicode"),
        ("--interactive --prompt Once", "leave out --prompt"),
    ],
)
def test_a_mistake_gets_one_line_and_status_2(main, runs, arguments, words):
    (runs / "empty").mkdir(exist_ok=True)
    (runs / "latin1.txt").write_bytes("Zwölf".encode("latin1"))
    whole = (runs / "out" / "new" / "best.pt").read_bytes()
    (runs / "broken.pt").write_bytes(whole[: len(whole) // 2])
    status, out, err = main(*arguments.split(" "))
    line = err.splitlines()[-1]
    assert status == 2 and out == "" and words in line and line.startswith("sample.py: ")
    assert len([line for line in err.splitlines() if not line.startswith("out/new")]) == 1


def test_no_run_at_all(main, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, out, err = main("--prompt", "Once")
    assert status == 2 and out == "" and "python train.py config/tiny.py" in err and err.count("\n") == 1


@pytest.mark.parametrize(
    "error, status",
    [
        (KeyboardInterrupt(), 130),
        (OSError(28, "No space left"), 1),
        (RuntimeError("two\nlines"), 1),
        (MemoryError(), 1),
        (torch.OutOfMemoryError("CUDA"), 1),
    ],
)
def test_what_the_machine_does_wrong(main, monkeypatch, error, status):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(sample, "write", fail)
    got, _, err = main("--prompt", "Once")
    assert got == status and "Traceback" not in err and err.count("\n") == (1 if status == 130 else 2)


@pytest.mark.skipif(os.name != "posix", reason="a pipe that closes, as POSIX has it")
def test_a_reader_that_leaves_gets_no_traceback(runs):
    pipe, line = subprocess.PIPE, command("--max_new_tokens", "5000")
    process = subprocess.Popen(line, cwd=runs, stdout=pipe, stderr=pipe)
    process.stdout.read(1)
    process.stdout.close()
    assert "Traceback" not in process.stderr.read().decode() and process.wait() == 0


@pytest.mark.skipif(os.name != "posix", reason="needs a pseudo-terminal")
def test_interactive(runs):
    import pty

    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        command("--interactive", "--max_new_tokens", "100000"),
        cwd=runs, stdin=theirs, stdout=theirs, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    os.close(theirs)
    watch = threading.Timer(60, process.kill)  # no reading below waits for ever
    watch.start()

    def read_until(words: bytes) -> bytes:
        got = b""
        while words not in got:
            got += os.read(ours, 1000)
        return got

    try:
        read_until(b"> ")
        os.write(ours, b"Hello\n")
        read_until(b"Hello")  # the terminal's echo, then the story
        assert len(os.read(ours, 1000)) > 0
        process.send_signal(signal.SIGINT)  # ends the story, not the program
        read_until(b"> ")
        os.write(ours, b"\x04")
        _, err = process.communicate(timeout=60)
        assert process.returncode == 0 and b"Traceback" not in err
    finally:
        watch.cancel()
        process.kill()
        os.close(ours)
