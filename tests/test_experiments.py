"""
The interface that every architecture implements: GPT and each file in experiments/ with a Config and a Model.
A new file is tested without a change here, unless its default configuration is too large: see SMALL.
"""

import json
import random
import re
from dataclasses import asdict, fields
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import ROOT, bit_equal, run_state

import evaluate
import experiments
import export
import prepare
import sample
import train
from nanostlm import checkpoint, score, settings, tokenizer, toystories
from nanostlm import data as datasets
from nanostlm import generate as generate_module
from nanostlm.generate import generate, greedy
from nanostlm.kv_cache import KVCache

NAMES = experiments.architectures()
V, EOT = 257, 256
SMALL = {  # settings of a small model, where the defaults are those of a large one
    "gpt": dict(n_layer=2, n_head=2, n_embd=16, tied=False, qk_norm=True),
    "patches": dict(n_layer=2, n_embd=16, local_embd=16, local_window=6, ngram_rows=64, encoder_layers=1),
    "thoughts": dict(n_layer=1, n_head=2, n_embd=16, local_embd=16, local_window=9, ngram_rows=64, latents=2),
}
TEXT = "<Once upon a time, Tom had 12 dogs! ¿Qué? 犬が好き 🐶🐕 \n\nThey ran, and ran... zwölf Bären> "
RUN = dict(
    **dict(dataset="mini", tokenizer="byte", device="cpu", dtype="float32", threads=1, batch_size=4),
    **dict(learning_rate=0.01, warmup_iters=2, max_iters=12, lr_decay_iters=12),
    **dict(eval_interval=6, save_interval=5, eval_tokens=100),
)


def small(name: str, **changes) -> torch.nn.Module:
    """A small model in eval mode with random weights, also where an initialization is zero."""
    Config, Model = experiments.architecture(name)
    torch.manual_seed(0)
    config = settings.update(Config(), **dict(block_size=48, vocab_size=V) | SMALL.get(name, {}) | changes)
    model = Model(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.15)
    return model


def texts(rows: int, length: int) -> torch.Tensor:
    """(rows, length) ids: pieces of TEXT, with end-of-text and random ids among them."""
    rng = np.random.default_rng(0)
    ids = np.frombuffer((TEXT * (2 + length // len(TEXT))).encode(), dtype=np.uint8)
    found = np.stack([ids[i : i + length] for i in rng.integers(0, len(TEXT.encode()), rows)]).astype(
        np.int64
    )
    other = np.where(rng.random(found.shape) < 0.5, EOT, rng.integers(0, V, found.shape))
    return torch.from_numpy(np.where(rng.random(found.shape) < 0.15, other, found))


@pytest.fixture(params=NAMES)
def name(request) -> str:
    return request.param


@pytest.fixture
def arguments(name, corpus) -> list[str]:
    """The command line of a small run of the architecture."""
    own = RUN | SMALL.get(name, {}) | dict(architecture=name, data_dir=corpus, block_size=24)
    return [f"--{key}={value}" for key, value in own.items()]


# ----------------------------------------------------------------------------------------------------------
# The model


def test_calls_return_logits_or_mean_loss(name):
    model = small(name).double()
    for rows, length in ((3, 48), (2, 7), (1, 1)):
        idx, targets = texts(rows, length), texts(rows, length + 1)[:, 1:]
        logits, none = model(idx)
        assert none is None and logits.shape == (rows, length, V) and logits.dtype == torch.float64
        none, loss = model(idx, targets)
        assert none is None and loss.ndim == 0
        expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        assert loss.item() == pytest.approx(expected.item(), abs=1e-9)
        ignored = targets.clone()
        ignored[:, 1::3] = -1
        expected = F.cross_entropy(logits.flatten(0, 1), ignored.flatten(), ignore_index=-1)
        assert model(idx, ignored)[1].item() == pytest.approx(expected.item(), abs=1e-9)


def test_logits_depend_on_earlier_ids_of_the_same_row_only(name):
    """Changing id t, to letters, spaces, ends of texts or parts of characters, changes nothing before it."""
    model, idx = small(name).double(), texts(4, 40)
    before = model(idx)[0]
    for row in range(4):
        assert torch.allclose(model(idx[row : row + 1])[0], before[row : row + 1], rtol=0, atol=1e-10)
    for t in range(0, 40, 3):
        for new in (ord("e"), ord(" "), EOT, 0x80, 0xF0):
            changed = idx.clone()
            changed[:, t] = torch.where(idx[:, t] == new, ord("."), new)
            difference = (model(changed)[0] - before).abs().amax(-1)
            assert difference[:, :t].max() < 1e-10 if t else True
            assert (difference[:, t] > 1e-6).all(), "the id itself matters"


def test_probabilities_of_the_next_id_sum_to_one(name):
    """By the loss, which need not be computed from the logits."""
    model, prefix = small(name).double(), torch.tensor([[EOT, *"a. Qué 犬".encode()[:-1]]])
    targets, total = torch.full_like(prefix, -1), 0.0
    with torch.no_grad():
        for i in range(V):
            targets[0, -1] = i
            total += model(prefix, targets)[1].neg().exp().item()
    assert total == pytest.approx(1, abs=1e-9)


def test_every_parameter_gets_a_gradient(name):
    """Also from a text of one letter; several processes average the gradients of all parameters."""
    model = small(name).train()
    for idx in (texts(2, 48), torch.full((1, 9), ord("a"))):
        model.zero_grad()
        model(idx, torch.roll(idx, -1, dims=1))[1].backward()
        assert [key for key, p in model.named_parameters() if p.grad is None] == []


def test_loglikelihood_is_the_sum_of_losses(name):
    model, ids = small(name).double(), [EOT, *texts(1, 30)[0].tolist()]
    idx, losses = torch.tensor([ids[:-1]]), []
    for i in range(10, 30):
        targets = torch.full_like(idx, -1)
        targets[0, i] = ids[i + 1]
        losses.append(model(idx, targets)[1].item())
    assert score.loglikelihood(model, ids[:11], ids[11:]) == pytest.approx(-sum(losses), abs=1e-4)
    nats, n = score.total(model, [ids[1:]], EOT)
    assert n == 30 and nats == pytest.approx(-score.loglikelihood(model, ids[:1], ids[1:]), abs=1e-4)


def test_cached_steps_give_the_logits_of_the_forward_pass(name):
    """After padded prompts of unequal length, and after rows are dropped and repeated."""
    model, lengths = small(name).double(), [9, 1, 4]
    if name != "gpt" and not hasattr(model, "new_cache"):
        return
    text = torch.tensor([[EOT, *b'Hi. "Go!" he said. So? \n\xc3\xa9 ran.', EOT, *b"A b"]])
    ids = torch.cat((text, text.roll(-5, 1), texts(1, text.shape[1])))
    expected = model(ids)[0]
    cache = KVCache(model.config, 3, dtype=torch.float64) if name == "gpt" else model.new_cache(3)
    padded = torch.full((3, 9), EOT)
    for row, n in enumerate(lengths):
        padded[row, 9 - n :] = ids[row, :n]
    segments = (torch.arange(9) >= 9 - torch.tensor(lengths)[:, None]).long()
    logits, rows = model(padded, cache=cache, segments=segments, last=True)[0], [0, 1, 2]
    for step in range(26):
        if step == 12:
            rows = [2, 0, 0]
            cache.select(rows)
            logits = logits[rows]
        at = torch.tensor([lengths[row] + step for row in rows])
        assert torch.allclose(logits[:, 0], expected[rows, at - 1], rtol=0, atol=1e-9), step
        logits = model(ids[rows, at][:, None], cache=cache)[0]


def test_samples_agree_with_the_likelihood(name):
    """
    Each sampled id falls somewhere in the cumulative distribution that the model gives the likeliest ids
    before it: uniformly, if it was drawn from that distribution. Chi-square over 20 bins.
    """
    model, rng = small(name), np.random.default_rng(1)
    prompts = [[*b"Tom ran. "], [*"犬 🐶 Zw".encode()], [], [*b"a"]] * 30
    places = []
    for prompt, new in zip(prompts, generate(model, prompts, 25, eot=EOT, seed=5), strict=True):
        new = new if len(new) == 25 else [*new, EOT]
        ids = torch.tensor([[EOT, *prompt, *new]])
        with torch.no_grad():
            probs = model(ids[:, :-1])[0][0, len(prompt) :].double().softmax(-1)
        p = probs.gather(1, ids[0, 1 + len(prompt) :, None])
        above = (probs * (probs > p)).sum(-1).numpy()
        places.extend(above + rng.random(len(new)) * p[:, 0].numpy())
    observed, expected = np.histogram(places, 20, (0, 1))[0], len(places) / 20
    chi_square = ((observed - expected) ** 2 / expected).sum()
    assert len(places) > 1500 and chi_square < 43.8, "19 degrees of freedom: p < 0.001"


def test_greedy_text_is_that_of_repeated_forward_passes(name):
    """With a cache or without, for prompts of unequal length in a batch; text goes on past the context."""
    model = small(name).double()
    prompts = [[*b"Tom ran. "], [*"犬 🐶".encode()], [], [*"¿Qué".encode()], [*b"Tom ran."]]
    found = generate(model, prompts, 30, [greedy], eot=EOT)
    for prompt, new in zip(prompts, found, strict=True):
        ids = [EOT, *prompt]
        with torch.no_grad():
            while len(ids) - len(prompt) <= 30 and (len(ids) == 1 + len(prompt) or ids[-1] != EOT):
                ids.append(model(torch.tensor([ids]))[0][0, -1].argmax().item())
        assert new == [i for i in ids[1 + len(prompt) :] if i != EOT]
    assert max(map(len, generate(model, prompts * 4, 70, eot=EOT, seed=2))) > 48


# ----------------------------------------------------------------------------------------------------------
# Particular architectures

VARIANTS = [
    *(("patches", dict(pooling=pooling)) for pooling in ("mean", "max", "attention")),
    *(("patches", changes) for changes in (dict(boundary="byte"), dict(encoder_layers=0, ngram=3))),
    ("patches", dict(boundary="stride", stride=3, pooling="mean", decoder_layers=0)),
    *(("thoughts", dict(context=context)) for context in ("none", "full")),
    ("thoughts", dict(local_window=3, ngram=1, latents=1)),
]


@pytest.mark.parametrize("name, changes", VARIANTS, ids=lambda x: x if type(x) is str else "-".join(x))
def test_each_setting_keeps_the_interface(name, changes, monkeypatch):
    monkeypatch.setitem(SMALL, name, SMALL[name] | changes)
    test_calls_return_logits_or_mean_loss(name)
    test_logits_depend_on_earlier_ids_of_the_same_row_only(name)
    test_cached_steps_give_the_logits_of_the_forward_pass(name)
    model = small(name)
    assert sum(p.numel() for p in model.parameters()) == model.config.estimate()["parameters"]


def test_patches_end_where_words_do():
    from experiments.patches import Config, patch_ends

    def ends(text: bytes, **changes) -> str:
        ids = torch.tensor([[i if i != ord("|") else EOT for i in text]])
        before = torch.cat((torch.tensor([[EOT]]), ids[:, :-1]), dim=1)
        found = patch_ends(Config(**changes), ids, before, torch.arange(ids.shape[1]))[0]
        return "".join(".^"[end] for end in found.tolist())

    assert ends(b"|Tom had 12  dogs!\n\nHe ran.|A") == "^...^...^..^.....^....^...^^."
    assert ends("|Qué é".encode()) == "^..^.^..", "at a space, or a character after a letter"
    assert ends("a犬犬".encode()) == "^^..^.."
    assert ends(b"|Tom had", boundary="stride", stride=3) == "^..^..^."


def test_sentences_begin_after_their_ends():
    from experiments.thoughts import sentence_starts

    text = b'Hi. "Go!" he said... Mr. X\nran.|So what? e.g. 3.5 "a.b" c'
    ids = torch.tensor([[i if i != ord("|") else EOT for i in text]])
    found = sentence_starts(ids, torch.full((1, 4), EOT))[0].tolist()
    parts, start = [], 0
    for i in [i for i, begins in enumerate(found) if begins] + [len(text)]:
        parts, start = [*parts, text[start:i].decode()], i
    assert parts == ["Hi.", ' "Go!"', " he said...", " Mr.", " X\nran.", "|So what?", " e.g.", ' 3.5 "a.b" c']


def test_only_latents_cross_sentences():
    """With an earlier sentence changed and the latents frozen, no later state changes; without, all may."""
    model = small("thoughts").double()
    one, other = (torch.tensor([[EOT, *text]]) for text in (b"Tom ran. He fell.", b"Mia sat. He fell."))
    x, starts, sentence = model.encode(one)
    predicted = model.predict(model.latents(x, sentence, 2))
    x_other, *_ = model.encode(other)
    before, after = (model.decode(states, starts, sentence, predicted) for states in (x, x_other))
    assert sentence[0].tolist() == [0] * 9 + [1] * 9 and not torch.equal(before[:, :9], after[:, :9])
    assert torch.equal(before[:, 9:], after[:, 9:])
    assert (model(one)[0] - model(other)[0])[:, 9:].abs().amax(-1).min() > 1e-9
    alone = small("thoughts", context="none").double()
    assert torch.equal(alone(one)[0][:, 9:], alone(other)[0][:, 9:])


def test_local_attention_is_that_with_a_dense_mask():
    from experiments.byte_parts import local_kernel

    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 2, 23, 4, dtype=torch.float64)
    starts = torch.tensor([[0] * 5 + [5] * 11 + [16] * 7, [0] * 23])
    i, j = torch.arange(23)[:, None], torch.arange(23)
    for window in (1, 4, 7, 23, 50):
        for where in (None, starts):
            visible = ((j <= i) & (i - j < window))[None, None]
            if where is not None:
                visible = visible & (j >= where[:, None, :, None])
            expected = F.scaled_dot_product_attention(q, k, v, visible)
            assert torch.allclose(local_kernel(window, where)(q, k, v), expected, atol=1e-12)


def test_written_sentence_is_that_of_the_predicted_latents():
    """Greedy text from the latents that a text predicts is the greedy continuation of that text."""
    model = small("thoughts")
    text = [*b"Tom ran. It was. "]
    [new] = generate(model, [text], 20, [greedy], eot=EOT)
    predicted = model.predict_next(torch.tensor([[EOT, *text[:-1]]]))
    [written] = model.write_sentences(predicted, most=20)
    assert written and written == bytes(new[: len(written)])
    assert model.write_sentences(predicted, torch.Generator().manual_seed(1), most=20) != [written]


def test_nextlat_adds_to_the_loss_in_training_only():
    model = small("thoughts", nextlat=0.5)
    idx, targets = texts(2, 40), texts(2, 41)[:, 1:]
    plain = small("thoughts").train()(idx, targets)[1]
    assert torch.equal(model(idx, targets)[1], small("thoughts")(idx, targets)[1])
    assert model.train()(idx, targets)[1] > plain


# ----------------------------------------------------------------------------------------------------------
# Training


def random_bytes(tokens: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, tokens).astype("<u2")


def bits_of_fresh_bytes(model) -> tuple[float, float]:
    """Bits per byte of new uniform random bytes, and three standard errors of this mean."""
    [nats] = score.score(model, [random_bytes(6000, seed=9)], EOT, device="cpu")
    bits = nats.astype(np.float64) / np.log(2)
    return bits.mean(), 3 * bits.std() / len(bits) ** 0.5


def test_fresh_random_bytes_take_at_least_8_bits(name):
    """No model predicts independent uniform bytes; one that sees its targets learns to."""
    model = small(name)
    c = train.TrainConfig(learning_rate=0.02, warmup_iters=2, max_iters=40, model=model.config)
    val = np.append(random_bytes(100, seed=8), EOT).astype("<u2")
    data = datasets.Data(random_bytes(30_000, seed=7), val, {}, tokenizer.get("byte"), Path("none"))
    trainer = train.Trainer(c, model, data)
    for step in range(40):
        trainer.train_step(step)
    bits, margin = bits_of_fresh_bytes(trainer.model.eval())
    assert bits >= 8 - margin and margin < 0.1


def test_fresh_random_bytes_show_a_model_that_sees_its_targets():
    class Leak(torch.nn.Module):
        config = experiments.architecture("bigram")[0](block_size=48)

        def forward(self, idx):
            return F.one_hot(F.pad(idx[:, 1:], (0, 1)), V).float(), None

    bits, margin = bits_of_fresh_bytes(Leak())
    assert bits < 8 - margin


def test_resume_is_bitwise_exact(name, arguments, tmp_path, monkeypatch):
    """Half of a run and the rest after --resume, without the recipe, are the whole run; dropout included."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train.report, "final", lambda *args: None)
    arguments = [*arguments, "--dropout=0.1"]
    assert train.main([*arguments, "--out_dir=whole"]) == 0
    assert train.main([*arguments, "--out_dir=half", "--max_iters=5"]) == 0
    assert train.main(["--resume", "--out_dir=half", "--max_iters=12"]) == 0
    whole, half = run_state("whole"), run_state("half")
    assert whole["architecture"] == name and whole["step"] == half["step"] == 12
    assert bit_equal(whole["model"], half["model"]) and bit_equal(whole["optimizers"], half["optimizers"])


def test_run_is_sampled_and_evaluated_from_its_checkpoint(name, arguments, tmp_path, monkeypatch, capsys):
    """train.py to its final report, then sample.py and evaluate.py, without the recipe."""
    monkeypatch.chdir(tmp_path)
    assert train.main([*arguments, "--out_dir=run", "--eval_tokens=0"]) == 0
    err, out = capsys.readouterr()[::-1]
    reported = float(re.search(r"val_bpb: ([\d.]+)", out)[1])
    assert reported < 8, "it has learned something"
    model, _ = checkpoint.load("run")
    assert experiments.name_of(model) == name and not model.training
    assert f"parameters: {sum(p.numel() for p in model.parameters())}\n" in out
    if name != "gpt":
        assert f"; {name}, context 24" in err, "the plan"
    assert sample.main(["run", "--prompt=Tom ¿é?", "--max_new_tokens=40", "--num_samples=2"]) == 0
    assert capsys.readouterr().out.count("Tom ¿é?") == 2
    if name != "gpt":
        assert sample.main(["run", "--compile"]) == 2
        assert f"--compile is not for architecture={name}" in capsys.readouterr().err
    assert evaluate.main(["run", "run", "--tasks=bpb", "--json=figures.json"]) == 0
    figures = json.loads(Path("figures.json").read_text())["run/best.pt"]["bpb"]["figures"]
    assert figures[0]["name"] == "bits per byte" and figures[0]["value"] == pytest.approx(reported, abs=1e-4)


def test_checkpoint_gives_the_same_model_without_a_recipe(name, tmp_path):
    model = small(name, dropout=0.25)
    state = {"model": model.state_dict(), "model_config": asdict(model.config), "architecture": name}
    checkpoint.save(tmp_path / "x.pt", state | {"tokenizer": tokenizer.get("byte").state()})
    loaded, _ = checkpoint.load(tmp_path / "x.pt")
    assert type(loaded) is type(model) and loaded.config == model.config and loaded.config.dropout == 0.25
    assert bit_equal(loaded.state_dict(), model.state_dict())
    assert bit_equal(loaded(texts(2, 20))[0], model(texts(2, 20))[0])


def test_init_from_takes_weights_of_the_same_architecture(name, tmp_path, arguments, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train.report, "final", lambda *args: None)
    assert train.main([*arguments, "--out_dir=first"]) == 0
    last = checkpoint.read("first/latest.pt")["model"]
    own = [f"--{setting}={value}" for setting, value in SMALL.get(name, {}).items()]
    more = [word for word in arguments if word not in own]
    more += ["--init_from=first/latest.pt", "--max_iters=1", "--learning_rate=1e-9"]
    assert train.main([*more, "--out_dir=second"]) == 0
    now = checkpoint.read("second/latest.pt")["model"]
    assert now.keys() == last.keys() and all(torch.allclose(now[k], last[k], atol=1e-6) for k in last)
    capsys.readouterr()
    other = "bigram" if name == "gpt" else "gpt"
    assert train.main([*more, f"--architecture={other}"]) == 2
    assert f"set architecture={name}" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------------
# Settings


def test_help_lists_the_settings_of_the_architecture(name, capsys):
    assert train.main([f"--architecture={name}", "--help"]) == 0
    text = capsys.readouterr().out
    names = {field.name for field in fields(experiments.architecture(name)[0])} - set(train.RESOLVED)
    assert "--max_iters " in text and all(f"--{setting} " in text for setting in names)


RECIPES = sorted((ROOT / "config" / "experiments").glob("*.py"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe_matches_its_comments(recipe):
    """It is valid, and states the number of parameters and the batch; the estimate is that of the model."""
    text, name = recipe.read_text(encoding="utf-8"), settings.peek([str(recipe)], "architecture")
    Config, Model = experiments.architecture(name)
    cls = settings.with_parts(train.TrainConfig, model=Config)
    c = settings.build(cls, settings.read_recipe(recipe, cls))
    c.validate()
    size = re.search(r"([\d.]+)M parameters", text)
    assert float(size[1]) == round(c.model.estimate()["parameters"] / 1e6, len(size[1].partition(".")[2]))
    batch = re.search(r"(\d+) rows x (\d+) tokens = ([\d,]+) tokens a step", text)
    rows, length, tokens = (int(n.replace(",", "")) for n in batch.groups())
    assert (rows, length, tokens) == (c.batch_size, c.model.block_size, rows * length)
    with torch.device("meta"):
        model = Model(c.model)
    assert sum(p.numel() for p in model.parameters()) == c.model.estimate()["parameters"]


def test_every_experiment_has_a_recipe():
    assert set(NAMES) - {path.stem for path in RECIPES} == {"gpt"}


@pytest.mark.parametrize("name", NAMES[1:])
def test_export_rejects_an_experiment_by_name(name, tmp_path, capsys):
    model = small(name)
    state = {"model": model.state_dict(), "model_config": asdict(model.config), "architecture": name}
    checkpoint.save(tmp_path / "x.pt", state | {"tokenizer": tokenizer.get("byte").state()})
    assert export.main(["--to", "hf", str(tmp_path / "hf"), str(tmp_path / "x.pt")]) == 2
    assert f"architecture={name}" in capsys.readouterr().err and not (tmp_path / "hf").exists()


@pytest.mark.parametrize(
    "words, message",
    {
        ("--architecture=bigrm",): "architecture must be one of gpt, bigram",
        ("--architecture", "../bigram"): "architecture must be one of gpt, bigram",
        ("--architecture=bigram", "--pointer=True"): "there is no option '--pointer'",
        ("--architecture=bigram", "--n_layer=2"): "there is no option '--n_layer'",
        ("--architecture=bigram", "--dropout=2"): "dropout must be between 0 and 0.999",
        ("--architecture=patches", "--compile=True"): "leave out compile: architecture=patches",
        ("--architecture=bigram", "--pair_tokens=100"): "leave out pair_tokens: architecture=bigram",
        ("--architecture=bigram", "--cross_stories=False"): "leave out cross_stories: architecture=bigram",
        ("--architecture=bigram", "--vocab_size=5"): "vocab_size comes from the tokenizer",
    }.items(),
    ids=lambda x: x if isinstance(x, str) else " ".join(x),
)
def test_user_error_is_one_line_that_names_it(words, message, corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert train.main([*words, f"--data_dir={corpus}", "--dataset=mini", "--tokenizer=byte"]) == 2
    err = capsys.readouterr().err
    assert message in err.splitlines()[-1] and "Traceback" not in err


@pytest.mark.parametrize("name", ["patches", "thoughts"])
def test_byte_models_refuse_another_tokenizer(name):
    with pytest.raises(ValueError, match="not of 300 ids: set tokenizer=byte"):
        small(name, vocab_size=300)


def test_architecture_of_a_run_cannot_change_on_resume(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train.report, "final", lambda *args: None)
    assert train.main([*arguments, "--out_dir=run"]) == 0
    other = "bigram" if "--architecture=gpt" in arguments else "gpt"
    assert train.main(["--resume", "--out_dir=run", f"--architecture={other}", "--max_iters=20"]) == 2
    assert "cannot change on resume: architecture" in capsys.readouterr().err


def test_recipe_selects_the_architecture_in_any_notation(tmp_path):
    path = tmp_path / "mine.py"
    for text in ('architecture = "bigram"', "x = 1\narchitecture='bigram'  # why"):
        path.write_text(text)
        assert settings.peek(["--seed", "1", str(path)], "architecture") == "bigram"
        assert settings.peek([str(path), "--architecture", "gpt"], "architecture") == "gpt"
        assert settings.peek(["--architecture=a", "--architecture=gpt", str(path)], "architecture") == "gpt"
    assert settings.peek([str(tmp_path), "--seed=1"], "architecture") == ""


def test_plain_dataclass_is_enough_for_a_configuration(tmp_path, monkeypatch, corpus):
    """Its size and memory come from defaults."""
    text = (ROOT / "experiments" / "bigram.py").read_text(encoding="utf-8")
    monkeypatch.setattr(experiments, "FOLDER", tmp_path)
    monkeypatch.setattr(experiments, "__path__", [str(tmp_path)])
    (tmp_path / "mine.py").write_text(text)
    assert experiments.architectures() == ["gpt", "mine"]
    Config, _ = experiments.architecture("mine")
    assert Config().estimate()["parameters"] == V * V
    assert Config().memory(1000, 4) > 16 * V * V


def test_readme_shows_the_bigram_model_as_it_is():
    readme = (ROOT / "experiments" / "README.md").read_text(encoding="utf-8")
    assert (ROOT / "experiments" / "bigram.py").read_text(encoding="utf-8") in readme


def test_compare_prints_a_table_and_repeats_nothing(tmp_path, monkeypatch, capsys):
    from experiments import compare

    written = [next(toystories.stories(1))[0], "Tom ran."]
    monkeypatch.setattr(generate_module, "stories", lambda *args, **kwargs: written)
    prepare.prepare("toystories", "byte", stories=60, data_dir=tmp_path / "data")
    words = [f"--data_dir={tmp_path}/data", f"--out_dir={tmp_path}/out", "--only=bigram+stories=50"]
    words += ["--corpora=toystories", "--seconds=0.01"]
    capsys.readouterr()
    compare.main(words)
    out = capsys.readouterr().out
    head, _, row = ([cell.strip() for cell in line.strip("|").split("|")] for line in out.splitlines())
    found = dict(zip(head, row, strict=True))
    assert found["model"] == "bigram+stories=50" and found["valid toystories"] == "50%"
    folder = tmp_path / "out" / "bigram+stories=50-toystories-1"
    result = json.loads((folder / "result.json").read_text())
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == result["max_iters"] == 101
    assert found["bits per byte"].startswith(f"{lines[-1]['bpb']:.2f}")
    assert result["broken"] == {"not of the grammar": 1}
    assert result["bpb_100"] < result["bpb_misspelled"] < 8
    monkeypatch.setattr(compare.subprocess, "run", None)
    compare.main([*words, "--table"])
    compare.main(words)
    assert capsys.readouterr().out == 2 * out
    with pytest.raises(ValueError, match="has runs of 0.01 s: choose another --out_dir"):
        compare.main([*words, "--seconds=1"])
    with pytest.raises(ValueError, match="there is no model trigram: there are bpe4096, patches"):
        compare.main(["--only=trigram+ngram=2"])


@pytest.mark.parametrize("model", ["bpe4096", "patches", "bytes", "thoughts", "bigram"])
def test_compare_never_trains_on_another_corpus(model):
    from experiments.compare import arguments

    words = arguments(f"{model}+seed=2", "tinystories", "here")
    kind = settings.peek(words, "architecture") or "gpt"
    cls = settings.with_parts(train.TrainConfig, model=experiments.architecture(kind)[0])
    _, recipe, given, _ = settings.command_line(cls, words, train.FLAGS, "")
    assert recipe["fallback"] == "toystories" and given["fallback"] == ""
    assert (given["dataset"], given["data_dir"], given["seed"]) == ("tinystories", "here", 2)


def test_compare_misspells_a_share_of_the_letters():
    from experiments.compare import misspell

    text = "Once upon a time, 12 dogs ran.\n" * 1000
    changed = misspell(text, random.Random(0))
    different = [(a, b) for a, b in zip(text, changed, strict=True) if a != b]
    assert all(a.isalpha() and b.isalpha() for a, b in different)
    assert 0.045 < len(different) / sum(map(str.isalpha, text)) < 0.055
