"""
The page that `export.py --to html` writes: its engine, in Node, equals PyTorch with the same int8 weights,
and its tokenizer gives equal ids. The page itself is tested in Debian's Chromium, driven by playwright.
"""

import base64
import copy
import json
import os
import random
import re
import shutil
import subprocess
from dataclasses import asdict
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from test_export import GPT2, NANOCHAT, STORIES, TEXTS, random_model, vocabularies

import export
from nanostlm import checkpoint, score, toystories
from nanostlm import tokenizer as tokenizers
from nanostlm.formats import html
from nanostlm.generate import generate, greedy, stories, temperature, top_p

FORMATS = html.FOLDER


@pytest.fixture(scope="module")
def bpe():
    return tokenizers.train_bpe(STORIES * 3, 300)


def engine_file(model, tokenizer) -> dict:
    """What the engine's `load` takes."""
    return html.describe(model, tokenizer) | {"weights": base64.b64encode(html.pack(model)[1]).decode()}


def node(body: str, **inputs):
    """Run JavaScript in Node, with the engine as E and the inputs as I; return what it returns."""
    if not shutil.which("node"):
        pytest.skip("needs Node.js")
    code = f"""const E = require({json.dumps(str(FORMATS / "engine.js"))});
        const I = JSON.parse(require("fs").readFileSync(0));
        const run = () => {{ {body} }};
        process.stdout.write(JSON.stringify(run()));"""
    result = subprocess.run(["node", "-e", code], input=json.dumps(inputs), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def floats(text: str) -> torch.Tensor:
    return torch.from_numpy(np.frombuffer(base64.b64decode(text), "<f4").copy())


# ----------------------------------------------------------------------------------------------------------
# The engine

TINY = dict(qk_norm=True, norm_weight=False, embed_norm=True, tied=False, pointer=True)  # as config/tiny.py
CASES = [
    dict(),
    TINY | dict(separator=299),
    TINY | dict(window=7, n_kv_head=2, position="alibi", norm="layernorm"),
    GPT2,
    GPT2 | dict(tied=False, pointer=True, embed_norm=True),
    NANOCHAT | dict(softcap=5.0, n_kv_head=2),
    dict(mlp="geglu", bias=True, norm_eps=1e-3, rope_theta=100.0, window=7, separator=299),
    dict(mlp="gelu", mlp_hidden=37, norm="none", n_kv_head=1),
    dict(mlp="relu", position="none", norm="layernorm", separator=299),
    dict(mlp="silu", position="sinusoidal", embed_norm=True, separator=299),
    dict(mlp="tanh", position="shaw", shaw_clip=5, window=12, n_kv_head=2),
    dict(mlp="leaky_relu", position="shaw", shaw_values=True, bias=True, n_kv_head=2, separator=299),
    dict(mlp="relu2", position="alibi", n_head=3, n_embd=48, n_kv_head=1, separator=299, window=20),
    dict(share="mlp", pointer=True, softcap=3.0, window=9, separator=299),
    dict(share="layers", qk_norm=True),
    dict(share="lora", lora_rank=3, bias=True, n_kv_head=2),
    dict(position="sinusoidal", n_head=3, n_embd=33, mlp_ratio=2.5),
    dict(position="learned", separator=299, block_size=47),
    GPT2 | dict(block_size=5),
    TINY | dict(block_size=1),
]

CONTINUE = """
    const bytes = (x) => Buffer.from(x.buffer).toString("base64");
    const { model, tokenizer } = E.load(I.file);
    const forced = new E.Sequence(model), logits = [];
    I.idx.forEach((_, n) => logits.push(...forced.logits(I.idx.slice(0, n + 1))));
    const ids = [tokenizer.eot, ...E.fit(I.prompt, model.config.block_size)];
    const sequence = new E.Sequence(model), steps = [];
    for (let n = 0; n < 200; n++) {
        const next = sequence.logits(ids);
        next[tokenizer.eot] = -Infinity;
        steps.push(...next);
        ids.push(E.draw(E.probabilities(next, { temperature: 0 }), 0));
    }
    return [bytes(new Float32Array(logits)), bytes(new Float32Array(steps)), ids.slice(-200)];
"""


@pytest.mark.filterwarnings("ignore:a prompt of")
@pytest.mark.parametrize("settings", CASES, ids=str)
def test_engine_equals_pytorch_with_the_same_int8_weights(settings, bpe):
    """
    Logits of a text that contains separators, and 200 greedy tokens, which continue past the context, with
    the logits of each step.
    """
    model = random_model(bpe, **settings)
    file = engine_file(model, bpe)
    html.dequantize(model)
    rng, V, seen = random.Random(0), bpe.vocab_size, []
    idx = [bpe.eot if rng.random() < 0.1 else rng.randrange(V) for _ in range(model.config.block_size)]
    prompt = bpe.encode("Once upon a time")

    def record(logits, history):
        logits[:, bpe.eot] = -torch.inf  # a story that does not end
        seen.append(logits[0].clone())
        return logits

    tokens = generate(model, [prompt], 200, [record, greedy], eot=bpe.eot)[0]
    with torch.no_grad():
        expected = model(torch.tensor([idx]))[0][0]
    logits, steps, actual = node(CONTINUE, file=file, idx=idx, prompt=prompt)
    assert expected.std() > 0.3
    torch.testing.assert_close(floats(logits).view(-1, V), expected, rtol=0, atol=1e-3)
    assert actual == tokens and len(tokens) == 200
    torch.testing.assert_close(floats(steps).view(-1, V), torch.stack(seen), rtol=0, atol=1e-3)


def test_a_sequence_continues_from_any_token(bpe):
    """A history that shares its beginning with the one before gives what a new sequence gives."""
    for settings in (TINY, TINY | dict(window=5), GPT2):
        model = random_model(bpe, **settings)
        rng = random.Random(1)
        ids = [rng.randrange(299) for _ in range(70)]
        histories = [ids[:30], ids[:20], ids[:20] + ids[40:45], ids[:21], ids[:21], ids, ids[:60], ids[:10]]
        again, new = node(
            """
            const { model } = E.load(I.file), copy = (logits) => [...logits];
            const one = new E.Sequence(model), again = I.histories.map((ids) => copy(one.logits(ids)));
            return [again, I.histories.map((ids) => copy(new E.Sequence(model).logits(ids)))];""",
            file=engine_file(model, bpe),
            histories=histories,
        )
        assert again == new


def test_samplers_equal_pytorch():
    rng = np.random.default_rng(0)
    flat, tied = rng.normal(size=400) * 0.1, np.repeat([2.0, 1.0, 0.0], 5)  # tied tokens stay or go together
    rows = [
        *(rng.normal(size=(6, 300)) * [[0.5], [1], [2], [3], [5], [9]]),
        flat,
        tied,
        np.log([0.5, 0.3, 0.2]),
    ]
    values = (0, 0.1, 0.5, 0.5 + 5e-7, 0.9, 0.999, 1)  # rounding may leave a sum below top_p
    cases = [(row, t, p) for row in rows for t in (0, 0.3, 1, 2) for p in values]
    actual = node(
        "return I.cases.map(([x, temperature, top_p]) => [...E.probabilities(x, { temperature, top_p })]);",
        cases=[(row.tolist(), t, p) for row, t, p in cases],
    )
    for (row, t, p), probs in zip(cases, actual, strict=True):
        logits = top_p(p)(temperature(t)(torch.tensor(row)[None], None), None)
        torch.testing.assert_close(
            torch.tensor(probs, dtype=torch.float64), logits[0].softmax(-1), rtol=0, atol=1e-9
        )


def test_draws_follow_the_probabilities_and_repeat_with_the_seed():
    probs = [0.1, 0, 0.6, 0.3]
    draws, again, other, edges = node(
        """
        const at = (u) => E.draw(I.probs, u);
        const many = (seed) => Array.from({ length: 20000 }, (_, n) => at(E.uniform(seed, n)));
        return [many(1), many(1), many(2), I.edges.map(at)];""",
        probs=probs,
        edges=[0, 0.0999, 0.1, 0.6999, 0.7001, 0.999999],
    )
    assert draws == again != other
    assert edges == [0, 0, 2, 2, 3, 3]
    for row in (draws, other):
        counts = np.bincount(row, minlength=4) / len(row)
        assert np.abs(counts - probs).max() < 0.015 and counts[1] == 0
    pairs = np.bincount([4 * a + b for a, b in zip(draws, draws[1:], strict=False)], minlength=16) / len(
        draws
    )
    assert np.abs(pairs - np.outer(probs, probs).flatten()).max() < 0.015  # successive draws are independent


def test_copies_equal_the_pointer(bpe):
    """The share of each token's probability that is copied, and the position that it is copied from."""
    model = random_model(bpe, **TINY)
    file = engine_file(model, bpe)
    html.dequantize(model)
    with torch.no_grad():
        model.pointer.sentinel.fill_(3.0)  # so that some tokens are generated, others copied
        file = engine_file(model, bpe)
        ids = [bpe.eot, *bpe.encode("the dog and the cat and the dog")]
        idx = torch.tensor([ids])
        x, head = model.states(idx)
        score, logits = head.copies.score[0, -1], head(x)[0, -1]
    total = torch.logaddexp(score.logsumexp(-1), head.copies.sentinel)
    tokens = node(
        """
        const sequence = new E.Sequence(E.load(I.file).model), logits = sequence.logits(I.ids);
        return I.all.map((id) => E.describe(sequence, logits, E.probabilities(logits, {}), id));""",
        file=file,
        ids=ids,
        all=list(range(bpe.vocab_size)),
    )
    likeliest = logits.topk(10)
    assert [entry["id"] for entry in tokens[0]["alternatives"]] == likeliest.indices.tolist()
    shares = []
    for i, token in enumerate(tokens):
        places = [s for s in range(len(ids) - 1) if ids[s + 1] == i]
        share = (score[places].logsumexp(-1) - total - logits[i]).exp().item() if places else 0
        assert abs(token["copied"] - share) < 1e-4
        assert token["from"] == (max(places, key=lambda s: score[s]) + 1 if places else -1)
        assert abs(token["bits"] + logits[i].item() / np.log(2)) < 1e-3
        assert abs(token["raw"] - logits[i].exp().item()) < 1e-5
        shares += [share] if places else []
    assert min(shares) < 0.9 and max(shares) > 0.1


def test_copies_past_the_context_are_found_in_the_history(bpe):
    """With learned positions, the context begins anew with its last half."""
    rng = random.Random(0)
    ids = [rng.randrange(299) for _ in range(60)]
    tokens = node(
        """
        const sequence = new E.Sequence(E.load(I.file).model), logits = sequence.logits(I.ids);
        return I.ids.map((id) => E.describe(sequence, logits, E.probabilities(logits, {}), id));""",
        file=engine_file(random_model(bpe, **GPT2, pointer=True), bpe),
        ids=ids,
    )
    found = [token for token in tokens if token["from"] >= 0]
    assert len(found) > 20 and all(ids[token["from"]] == token["id"] for token in found)


def test_tied_and_shared_weights_are_stored_once(bpe):
    for settings in (dict(share="layers"), dict(share="mlp"), dict(share="lora"), dict(tied=True)):
        model = random_model(bpe, **settings)
        tensors, data = html.pack(model)
        own = [p for p in model.parameters()]
        assert len({at for at, _, _ in tensors.values()}) == len(own)
        assert len(data) < 1.4 * sum(p.numel() * (1 if p.ndim == 2 else 4) for p in own)


def test_special_tokens_of_fill_in_the_middle_have_no_text(bpe):
    tokens = bpe.with_special(tokenizers.FIM)
    file = engine_file(random_model(tokens), tokens)
    body = (
        "const { tokenizer: t } = E.load(I); return [t.eot, [1, 2, 3].map((i) => t.bytes(t.eot + i).length)]"
    )
    assert node(body, **file) == [bpe.eot, [0, 0, 0]]
    assert html.describe(random_model(bpe), bpe)["tokens"] == file["tokens"]


def test_unsupported_settings_are_named(bpe, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="^causal=False has no equivalent in the page's engine$"):
        html.to_html(random_model(bpe, causal=False), bpe, tmp_path / "x.html", {}, "x")
    monkeypatch.setitem(html.SUPPORTED, "mlp", ["relu"])  # as if model.py had a new component
    with pytest.raises(ValueError, match="^mlp=swiglu has no equivalent in the page's engine$"):
        html.to_html(random_model(bpe), bpe, tmp_path / "x.html", {}, "x")
    assert not list(tmp_path.iterdir())


def test_export_tells_bits_per_byte_of_float_and_int8_weights(corpus, tmp_path, monkeypatch, capsys):
    """And the card names the data and the command. Without the data, there is a note instead."""
    monkeypatch.chdir(tmp_path)
    byte, run = tokenizers.get("byte"), tmp_path / "out" / "mini"
    model = random_model(byte, **TINY)
    trained = {"data_dir": str(corpus), "dataset": "mini", "tokenizer": "byte"}
    state = {"model": model.state_dict(), "model_config": asdict(model.config), "tokenizer": byte.state()}
    run.mkdir(parents=True)
    checkpoint.save(run / "best.pt", state | {"train_config": trained, "step": 7})
    (run / "config.json").write_text('{"command": ["train.py", "config/mini.py", "--prompt=a b"]}')
    assert export.main(["--to", "html", "a.html"]) == 0
    ids = np.fromfile(corpus / "mini" / "byte" / "val.bin", "<u2").astype(int)
    expected = [score.total(m, [ids], byte.eot)[0] for m in (model, html.dequantize(copy.deepcopy(model)))]
    exact, rounded = (f"{nats / np.log(2) / len(ids):.4f}" for nats in expected)
    assert f"bits per byte: {exact} in float32, {rounded} with the int8 weights" in capsys.readouterr().out
    page = Path("a.html").read_text()
    for text in (f"{rounded} on validation", "mini, ", "config/mini.py '--prompt=a b'", "<title>mini "):
        assert text in page
    assert export.main(["--to", "html", "a.html"]) == 2 and "exists" in capsys.readouterr().err
    checkpoint.save(run / "best.pt", state | {"train_config": trained | {"data_dir": "gone"}})
    assert export.main(["--to", "html", "b.html"]) == 0
    assert "no validation stories here" in capsys.readouterr().out


# ----------------------------------------------------------------------------------------------------------
# The tokenizer


ODD = [
    *TEXTS,
    "e\u0301 क्षि नमस्ते 你好，世界 שלום עולם مرحبا بالعالم สวัสดี 👩‍👩‍👧‍👦🏳️‍🌈 🇩🇪",
    "a\u0085b\u00a0c\ufeffd\u2028e\u200bf \u3000 g\u1680h \x1c\x1f\x0b\x0c i",  # blanks, and what is not
    "\n\n\n  x   \r\n y \t\t\n",
    "   ",
    "\n",
    "x ",
    " 'S 's 'll 'LL 're'veit'd don''t",
    "½ ² ١٢٣ Ⅷ 12ab34",
    "\ufffd\ufffe\U0010ffff \ue000 \x7f\x00",
    "aaaaaaaaaaaaaaaaaaaaaaaaa" * 20,
    "<|endoftext|>",
    "𝒜𝓑 𐍈 ꙮ",
]


def encoded(tokenizer, texts: list[str]) -> list[list[int]]:
    tokens = html.describe(random_model(tokenizer, n_embd=8, n_layer=1), tokenizer)["tokens"]
    return node(
        "const t = new E.Tokenizer(I.tokens); return I.texts.map((x) => t.encode(x));",
        tokens=tokens,
        texts=texts,
    )


def test_tokenizer_ids_match(bpe):
    stories = [text for text, _ in islice(toystories.stories(0), 100)]
    rng = random.Random(0)
    letters = "ab' \n1é你🙂\u0085\u00a0.s"
    texts = ODD + stories + ["".join(rng.choices(letters, k=rng.randint(0, 30))) for _ in range(1000)]
    for tokenizer in (*vocabularies(bpe), tokenizers.train_bpe(stories, 2000)):
        assert encoded(tokenizer, texts) == [tokenizer.encode(text) for text in texts], tokenizer.name


def test_words_of_javascript_are_text_for_the_tokenizer():
    """GPT-2 has the token " undefined": a space and a missing neighbor must not become it."""
    words = ["undefined", " undefined", "constructor", "__proto__", "null", "NaN"]
    tokens = [bytes([b]) for b in range(256)] + [word.encode() for word in words]
    tokenizer = tokenizers.Tokenizer("bpe263", tokens)
    texts = ["  ", " ", "x ", "undefined", " undefined", "constructor __proto__", "null NaN"]
    assert encoded(tokenizer, texts) == [tokenizer.encode(text) for text in texts]


def test_lone_surrogates_become_replacement_characters(bpe):
    assert encoded(bpe, ["a\ud800b"]) == [bpe.encode("a\ufffdb")]


def test_tokenizer_ids_match_on_real_stories(tinystories):
    from nanostlm import sources

    texts = [
        text
        for text, _ in zip(
            sources.read_files(sorted(map(str, tinystories.rglob("*.parquet")))), range(700), strict=False
        )
    ]
    tokenizer = tokenizers.train_bpe(texts[500:], 2000)
    assert encoded(tokenizer, texts[:500]) == [tokenizer.encode(text) for text in texts[:500]]


# ----------------------------------------------------------------------------------------------------------
# The checker of toystories


def test_checker_equals_that_of_toystories():
    """The verdict, and how far it can parse: stories, with a wrong word, and beginnings."""
    rng, texts = random.Random(0), []
    drawn = {row[0] for rows in toystories.GRAMMAR.lists.values() for row in rows}
    for text, _ in islice(toystories.stories(3), 150):
        words = text.split(" ")
        words[rng.randrange(len(words))] = rng.choice(text.split())
        names = sorted(drawn & set(re.findall(r"\w+", text)))  # two of which may exclude each other
        renamed = text.replace(rng.choice(names), rng.choice(names))
        texts += [text, " ".join(words), text[: rng.randrange(len(text))].strip(), renamed]
    actual = node(
        f"""const {{ checkToystory }} = require({json.dumps(str(FORMATS / "toystories.js"))});
        return I.texts.map((text) => checkToystory(I.grammar, text));""",
        grammar=html.compact(toystories.GRAMMAR),
        texts=texts,
    )
    for text, verdict in zip(texts, actual, strict=True):
        misses = []
        ok = any(True for _ in toystories.derivations(text))
        assert verdict["ok"] == ok
        if not ok:
            list(toystories._parse(" ".join(text.split()), [toystories._initial_thread()], misses))
            assert verdict["reach"] == max(miss.reach for miss in misses), text
    assert sum(verdict["ok"] for verdict in actual) >= 150


def test_checker_is_small():
    size = len(json.dumps(html.compact(toystories.GRAMMAR), ensure_ascii=False).encode())
    assert size + (FORMATS / "toystories.js").stat().st_size < 100_000


# ----------------------------------------------------------------------------------------------------------
# The page, in a browser


@pytest.fixture(scope="module")
def story_model(bpe):
    """A random model whose stories do not end, with a pointer that copies."""
    model = random_model(bpe, **TINY, n_embd=128)
    with torch.no_grad():
        model.head.linear.weight *= 3
        model.head.linear.weight[bpe.eot] = 0
        model.pointer.sentinel.fill_(3.0)
    return html.dequantize(model)


@pytest.fixture(scope="module")
def story_page(story_model, bpe, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "story.html"
    html.to_html(
        story_model, bpe, path, {"Parameters": "1M", "Data": "</script> & <b>odd</b>"}, "A <tale> & more"
    )
    return path.as_uri()


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip("playwright.sync_api", reason="needs pip install playwright")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if not chromium:
        pytest.skip("needs Chromium (apt-get install chromium)")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser, story_page):
    """open_page(...) opens the page in a new window; a line in the console or a request fails the test."""
    contexts, faults = [], []

    def opened(address=story_page, **options):
        contexts.append(browser.new_context(**options))
        page = contexts[-1].new_page()
        page.set_default_timeout(20_000)
        page.on("console", lambda message: faults.append(message.text))
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("request", lambda request: faults.extend([request.url] if local(request.url) else []))
        page.goto(address)
        page.wait_for_selector("#go:enabled")
        return page

    def local(url):
        return url != story_page and not url.startswith(("blob:", "data:"))

    yield opened
    for context in contexts:
        context.close()
    assert not faults


def written(page) -> str:
    """The story, once it is complete."""
    page.wait_for_selector("#stop:disabled")
    return page.inner_text("#story")


def test_page_writes_the_greedy_story_of_pytorch(open_page, story_model, bpe):
    page = open_page()
    page.fill("#prompt", "Tom had a red ball")
    page.fill("#temperature", "0")
    page.click("#go")
    expected = stories(story_model, bpe, "Tom had a red ball", 1, 500, temperature=0, top_p=1)[0]
    page.wait_for_selector("#status:has-text('tokens/s')")
    assert page.text_content("#story") == expected and len(expected) > 500
    assert page.text_content("h1") == "A <tale> & more" and "</script> & <b>odd</b>" in page.text_content(
        "#card"
    )


def test_page_repeats_its_story_for_a_seed(open_page):
    page, texts = open_page(), []
    for seed in (5, 6, 5):
        page.fill("#seed", str(seed))
        page.click("#go")
        texts.append(written(page))
    assert texts[0] == texts[2] != texts[1]
    page.click("#undo")
    assert page.inner_text("#story") == texts[1]  # undo returns to the story before


def test_page_stops_and_continues(open_page):
    page = open_page()
    whole = page.evaluate("""async () => {
        const story = document.getElementById("story");
        document.getElementById("go").click();
        await new Promise((resolve) => {
            const check = () => story.children.length > 9 && resolve();
            new MutationObserver(check).observe(story, { childList: true });
        });
        document.getElementById("stop").click();
        return story.children.length;
    }""")
    page.evaluate("late = 0, worker.addEventListener('message', () => late++)")
    page.wait_for_timeout(300)
    assert page.evaluate("late") <= 2  # the engine stopped, too
    assert page.locator("#story > span").count() == whole < 400
    assert page.inner_text("#status") == f"Stopped after {whole} tokens"
    page.click("#step")
    page.wait_for_selector("#stop:disabled")
    assert page.locator("#story > span").count() == whole + 1
    page.click("#continue")
    assert len(written(page)) > 0 and page.locator("#story > span").count() == whole + 501
    page.fill("#prompt", "The dog")  # another beginning is another story
    page.click("#step")
    assert written(page).startswith("The dog") and page.locator("#story > span").count() < 20


def test_page_branches_at_an_alternative_and_goes_back(open_page):
    page = open_page()
    page.fill("#top_p", "0.5")
    page.click("#go")
    first = written(page)
    texts = page.locator("#story > span").all_text_contents()
    n = next(n for n in range(20, len(texts)) if texts[n].strip())  # a part of a character has no text
    page.locator("#story > span").nth(n).hover()
    rows = page.locator("#details tr").all_inner_texts()
    assert len(rows) in (11, 12) and "raw" in rows[0]
    raw = [float(row.split("\t")[1].strip("%<")) for row in rows[1:11]]
    assert raw == sorted(raw, reverse=True) and 0 < sum(raw) < 100.1
    assert any(row.endswith("cut") for row in rows)
    other = page.locator("#details tr:not(.chosen) td button").first
    other.click()
    second = written(page)
    spans = page.locator("#story > span").all_text_contents()
    assert second != first and spans[:n] == texts[:n] and spans[n] != texts[n]
    assert page.locator("#story > .fork").count() == 1
    branches = page.locator("#branches button")
    assert branches.count() == 2
    branches.nth(0).click()
    assert page.inner_text("#story") == first
    branches.nth(1).click()
    assert page.inner_text("#story") == second
    page.click("#undo")
    page.click("#undo")
    page.click("#undo")
    assert page.inner_text("#story") == first and page.locator("#branches button").count() == 2


def test_page_shows_where_the_pointer_copies_from(open_page):
    page = open_page()
    page.click("#go")
    written(page)
    copied = page.locator("#story > .copied").nth(5)
    copied.hover()
    text = copied.text_content()
    assert page.locator("#story > .from").all_text_contents() == [text]
    assert "copied from the story" in page.inner_text("#details")
    assert page.locator("#line").is_visible()


def test_page_works_with_a_keyboard(open_page):
    page = open_page()
    page.focus("#prompt")
    page.keyboard.press("Control+a")
    page.keyboard.type("The dog")
    page.keyboard.press("Enter")
    first = written(page)
    assert first.startswith("The dog")
    page.focus("#story")
    page.keyboard.press("Home")
    for _ in range(30):
        page.keyboard.press("ArrowRight")
    active = page.evaluate("[...document.querySelectorAll('#story > span')].map((x) => x.className)")
    assert [i for i, name in enumerate(active) if "active" in name] == [30]
    page.keyboard.press("Enter")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    assert written(page) != first and page.locator("#branches button").count() == 2
    page.keyboard.press("ArrowLeft")
    assert page.locator("#details").is_visible()
    page.keyboard.press("Escape")
    assert page.locator("#details").is_hidden()


def test_page_layout_holds_still_on_any_screen_and_in_any_direction(open_page):
    for size in ((360, 640), (1280, 800)):
        page = open_page(viewport=dict(zip(("width", "height"), size, strict=True)))
        boxes = [page.locator("#story").bounding_box()]
        page.fill("#prompt", "مرحبا بالعالم")
        page.click("#go")
        written(page)
        boxes.append(page.locator("#story").bounding_box())
        assert [boxes[0][k] for k in ("x", "y", "width")] == [boxes[1][k] for k in ("x", "y", "width")]
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        assert page.evaluate("getComputedStyle(document.getElementById('story')).direction") == "rtl"


def test_page_has_no_accessibility_violation(open_page):
    """With axe-core, in light and dark, with the alternatives and branches open."""
    axe = os.environ.get("AXE_CORE")
    if not axe:
        pytest.skip("needs AXE_CORE=path to axe.min.js of the npm package axe-core")
    for options in (dict(), dict(color_scheme="dark"), dict(viewport={"width": 360, "height": 640})):
        page = open_page(**options)
        page.check("#shade")
        page.fill("#prompt", STORIES[1])  # axe is slow on long stories
        page.click("#step")
        written(page)
        page.evaluate(Path(axe).read_text())
        for _ in range(2):
            page.locator("#story > span").nth(7).click()
            page.locator("#details button").nth(3).wait_for()
            report = page.evaluate("axe.run()")
            assert [(v["id"], v["nodes"][0]["html"]) for v in report["violations"]] == []
            page.evaluate("""() => {
                document.querySelector("#details tr:not(.chosen) button").click();
                document.getElementById("stop").click();
            }""")
            page.click("#undo")
