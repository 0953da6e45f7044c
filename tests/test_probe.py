"""Probes: states against a slow loop, planted and random labels, folds, groups, toystories, errors."""

import json
import random
import re
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_model import V, tiny
from torch import nn

from model import attn_inputs
from nanostlm import probe, tokenizer, toystories

pytest.importorskip("sklearn", reason="needs scikit-learn: pip install -r requirements-eval.txt")
EOT, BYTE = V - 1, tokenizer.get("byte")


@pytest.fixture(scope="module")
def subject() -> SimpleNamespace:
    return SimpleNamespace(name="random", model=tiny(vocab_size=257, block_size=64), tokenizer=BYTE)


def texts(*sizes: int) -> list[list[int]]:
    rng = random.Random(0)
    return [[rng.randrange(V - 1) for _ in range(n)] for n in sizes]


def padded(rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    lengths = [len(row) for row in rows]
    idx = [[EOT, *row] + [EOT] * (max(lengths) - len(row)) for row in rows]
    return torch.tensor(idx), torch.tensor(lengths)


@torch.no_grad()
def slow_states(model, text: list[int]) -> np.ndarray:
    """(layers + 1, n_embd): one text alone, layer by layer and token by token."""
    idx = torch.tensor([[EOT, *text]])
    positions, attn = attn_inputs(model.config, idx)
    states = [model.embedder(idx, positions)]
    for layer, block in enumerate(model.core.blocks):
        states.append(block(states[-1], attn, layer))
    means = []
    for x in states:
        mean = torch.zeros(x.shape[-1], dtype=torch.float64)
        for t in range(1, len(text) + 1):
            mean += x[0, t].double() / len(text)
        means.append(mean.numpy())
    return np.stack(means)


SHAPES = [
    {},
    {"share": "layers", "n_layer": 3},
    {"separator": EOT},
    {"position": "learned"},
    {"causal": False},
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_states_are_means_over_the_tokens_of_each_text(shape):
    """Without end-of-text and padding, in every batch."""
    model, rows = tiny(**shape), texts(5, 1, 15, 9)
    expected = np.stack([slow_states(model, text) for text in rows], axis=1)
    assert expected.shape == (model.config.n_layer + 1, 4, model.config.n_embd)
    for height in (1, 3, 16):
        found = probe.features(model, rows, EOT, height)
        np.testing.assert_allclose(found, expected, atol=1e-5)
    assert not any(module._forward_hooks for module in model.modules())
    if shape.get("causal", True):
        for layer, means in enumerate(probe.states(model, *padded(rows))):
            np.testing.assert_allclose(means.numpy(), expected[layer], atol=1e-5)


def test_states_of_a_transformers_model(tmp_path):
    """Those of our own model, except for the last, which is after the norm; and its hidden_states."""
    transformers = pytest.importorskip("transformers")
    from nanostlm.formats import hf

    ours, rows = tiny(vocab_size=257), texts(7, 3)
    hf.to_hf(ours, BYTE, tmp_path)
    inner = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)

    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.config = inner, ours.config

        def forward(self, idx):
            return self.inner(idx).logits, None

    idx, lengths = padded(rows)
    expected, found = probe.states(ours, idx, lengths), probe.states(Wrapper(), idx, lengths)
    assert len(expected) == len(found) == ours.config.n_layer + 1
    for mine, theirs in zip(expected[:-1], found, strict=False):
        np.testing.assert_allclose(theirs, mine, atol=1e-5)
    hidden = inner(idx[:1], output_hidden_states=True).hidden_states[-1][0, 1:8].mean(dim=0)
    np.testing.assert_allclose(found[-1][0], hidden.detach(), atol=1e-5)


def test_models_without_layers_are_refused():
    with pytest.raises(ValueError, match="Linear has no embedder and blocks"):
        probe.states(nn.Linear(2, 2), *padded(texts(3)))


# ----------------------------------------------------------------------------------------------------------
# Accuracies


def items(n: int, words: dict[str, list[str]], seed: int = 0) -> list[dict]:
    """n items whose texts have two words of their label, among others."""
    rng, common = random.Random(seed), "the dog ran to a big house and sat".split()
    labels = [label for label in words for _ in range(n // len(words))]
    made = []
    for label in labels:
        text = rng.choices(common, k=6) + rng.choices(words[label], k=2)
        rng.shuffle(text)
        made.append({"text": " ".join(text), "label": label})
    return made


def accuracies(result) -> dict[str, float]:
    return {figure.name: figure.value for figure in result.figures}


PLANTED = {"animal": ["zzzz", "zzz"], "music": ["vvvv", "vvv"]}
ROWS = ["embedder", "layer 1", "layer 2", "bag of words", "most frequent label"]


def test_a_planted_label_is_found_everywhere(subject):
    made = items(80, PLANTED)
    result = probe.probe(subject, made + made[:1])
    assert accuracies(result) == dict.fromkeys(ROWS[:-1], 1.0) | {"most frequent label": 41 / 81}
    assert all(figure.n == 81 and figure.low < figure.value <= figure.high for figure in result.figures)
    assert result.items[0] == made[0] | {"predicted": dict.fromkeys(ROWS, "animal")}
    assert result.notes == ["logistic regression on mean states, 5 folds"]


def test_random_labels_are_not_found(subject):
    made = items(400, {"any": PLANTED["animal"] + PLANTED["music"]})
    labels = random.Random(1)
    made = [item | {"label": labels.randrange(2)} for item in made]
    for value in accuracies(probe.probe(subject, made)).values():
        assert 0.4 < value < 0.6


def test_the_seed_decides_the_folds_and_the_batch_nothing(subject):
    made = items(60, PLANTED)
    for i, item in enumerate(made):
        item["label"] = "xyz"[i % 3]
    results = [probe.probe(subject, made, seed=seed, rows=rows) for seed, rows in [(0, 1), (0, 64), (1, 64)]]
    assert results[0] == results[1] and results[0].items != results[2].items
    pairs = probe.split(made, 4, 0, "")
    assert sorted(i for _, test in pairs for i in test) == list(range(60))
    for train, test in pairs:
        assert not set(train) & set(test)
        assert Counter(made[i]["label"] for i in test) == dict.fromkeys("xyz", 5)


def test_groups_are_predicted_by_what_was_learned_from_others(subject):
    """Each group's own word gives the label away, but it is not in the training folds of the group."""
    words = {f"{label}{i}": [f"w{label}{i}q"] for label in "ab" for i in range(6)}
    made = [item | {"label": item["label"][0], "group": item["label"]} for item in items(240, words)]
    grouped = probe.probe(subject, made, folds=3)
    for train, test in probe.split(made, 3, 0, ""):
        assert not {made[i]["group"] for i in train} & {made[i]["group"] for i in test}
    alone = probe.probe(subject, [{k: item[k] for k in ("text", "label")} for item in made], folds=3)
    assert accuracies(alone)["bag of words"] == 1 and accuracies(grouped)["bag of words"] < 0.8
    assert "12 groups once" in grouped.notes[0]
    narrow, wide = (next(f for f in r.figures if f.name == ROWS[-1]) for r in (alone, grouped))
    assert (narrow.value, narrow.n) == (wide.value, wide.n) == (0.5, 240)
    assert wide.high - wide.low > 3 * (narrow.high - narrow.low)


def test_long_texts_are_cut_with_a_note():
    model = tiny(vocab_size=257, block_size=64, position="learned")
    subject, made = SimpleNamespace(model=model, tokenizer=BYTE), items(40, PLANTED)
    made[3]["text"] += " the dog" * 20
    result = probe.probe(subject, made)
    assert result.notes[1] == "1 of 40 texts are cut to their first 63 tokens"
    short = [item | {"text": item["text"][:63]} for item in made]  # of the byte tokenizer
    assert probe.probe(subject, short).figures[:3] == result.figures[:3]


# ----------------------------------------------------------------------------------------------------------
# The sets of toystories


def test_plots_of_toystories(subject):
    made = probe.probe_sets("toystories-plot", seed=3, n=300)
    assert made[:20] == probe.probe_sets("toystories-plot", seed=3, n=20)
    assert made[:20] != probe.probe_sets("toystories-plot", seed=4, n=20)
    plots = re.findall(r"<(\w+)>", toystories.GRAMMAR.texts["story"])
    assert {item["label"] for item in made} == set(plots) and len(plots) == 14
    for i, item in enumerate(made[:40]):
        text, plot, *_ = probe.toystory(3, i)
        assert toystories.check(text).ok and "\n" not in item["text"] and text.startswith(item["text"] + "\n")
        assert plot == item["label"]
    # what the words of an opening say about its plot and wording, read off the grammar
    wording = {
        "Pack your bag": ("trip", "0"),
        "left in the shop": ("share", "1"),
        "I am not afraid": ("fear", "1"),
        "Everybody was asleep": ("night", "2"),
    }
    for start, (plot, opening) in wording.items():
        [group] = {item["group"] for item in made if start in item["text"]}
        assert group.split() == [plot, opening]
    result = accuracies(probe.probe(subject, made))
    assert 0.4 < result["bag of words"] < 0.9 and result["most frequent label"] < 0.15


def test_pronouns_of_toystories(subject):
    made = probe.probe_sets("toystories-pronoun", seed=3, n=400)
    names = {
        "she": ["Lily", "Mia", "Anna", "Sue", "Emma", "Lucy"],
        "he": ["Tom", "Ben", "Tim", "Max", "Leo", "Jack"],
    }
    for item in made:
        words = re.findall(r"\w+", item["text"])
        assert {word for word in words if word in names["she"] + names["he"]} == {item["group"]}
        assert item["group"] in names[item["label"]]
        gendered = "he she him her his himself herself boy girl".split()
        assert not set(gendered) & {word.lower() for word in words}
    assert len({item["group"] for item in made}) == 12
    for train, test in probe.split(made, 5, 0, ""):
        assert {made[i]["label"] for i in test} == {"he", "she"}
        assert not {made[i]["group"] for i in train} & {made[i]["group"] for i in test}
    result = accuracies(probe.probe(subject, made))
    assert 0.35 < result["bag of words"] < 0.6  # the names in test are new


# ----------------------------------------------------------------------------------------------------------
# Files and errors

GOOD = b'{"text": "a", "label": "x"}\n'


def test_files(subject, tmp_path):
    made = items(40, PLANTED)
    path = tmp_path / "mood.jsonl"
    path.write_text("\n\n".join(map(json.dumps, made)) + "\n", encoding="utf-8")
    assert probe.probe(subject, path).figures == probe.probe(subject, made).figures
    assert probe.read(path)[1] == made[1] | {"line": 3}
    some = [item["text"] for item in probe.probe(subject, path, limit=20).items]
    every = [item["text"] for item in made]
    assert len(some) == 20 and not Counter(some) - Counter(every) and some != every[:20]
    with pytest.raises(FileNotFoundError, match="^there is no file toystories, and no set of that name: toy"):
        probe.probe(subject, "toystories")


@pytest.mark.parametrize(
    "line, message",
    [
        (b'{"text": "\xff", "label": "x"}', "line 3: not UTF-8"),
        (b'{"text": "a"', "line 3: not JSON"),
        (b'{"text": "a"}', "line 3: label is missing"),
        (b'{"label": "a"}', "line 3: text is missing"),
        (b'{"text": " ", "label": "x"}', "line 3: text must be text that is not blank, not ' '"),
        (b'{"text": "a", "label": 0.5}', "line 3: label must be text or a whole number, not 0.5"),
        (b"[1]", "line 3: the content must be an object"),
        (b'{"text": "a", "label": "y"}', "label 'y', first in line 3, has 1 items: 5 folds need 5"),
        (b"", "9 items with 1 label: a probe needs two labels"),
        (b'{"text": "a", "label": "y", "group": "g"}', "some items have a group, and others have none"),
    ],
)
def test_errors_name_the_file_and_the_line(subject, tmp_path, line, message):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(GOOD * 2 + line + b"\n" + GOOD * 7)
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}[:,] {re.escape(message)}"):
        probe.probe(subject, path)


def test_too_few_groups(subject):
    made = [item | {"group": item["label"]} for item in items(40, PLANTED)]
    with pytest.raises(
        ValueError, match="^the items: 2 groups are too few for 2 folds: label '(animal|music)'"
    ):
        probe.probe(subject, made, folds=2)
    more = [item | {"group": f"{item['label']} {i % 2}"} for i, item in enumerate(made)]
    with pytest.raises(ValueError, match="^the items: 4 groups are too few for 5 folds$"):
        probe.probe(subject, more, folds=5)


def test_without_scikit_learn_the_error_says_what_to_install(subject, monkeypatch):
    monkeypatch.setattr(probe, "find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match="^scikit-learn is not installed: pip install -r requirements-eval.txt$"
    ):
        probe.probe(subject, [])
