"""objective=fim, fill in the middle: rows, loss, special tokens, runs, sample.py --prefix, measurements."""

import json
import math
import random
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import MICRO, ROOT, bit_equal, metrics, random_data, run_script, run_state
from test_export import STORIES, RunC, open_hf, random_model

import evaluate
import prepare
import sample
from experiments import fim
from model import GPT, GPTConfig
from nanostlm import checkpoint, memorization, score, settings, toystories
from nanostlm import tokenizer as tokenizers
from nanostlm.data import load_data
from nanostlm.formats.hf import from_hf, to_hf
from nanostlm.formats.llama2c import to_llama2c
from nanostlm.generate import chain, generate
from nanostlm.tokenizer import FIM
from train import TrainConfig, Trainer

EOT, SUF, PRE, MID = 256, 257, 258, 259
SPECIAL = [SUF, PRE, MID]
RUN = dict(objective="fim", max_iters=12)


def rows_of(*stories: list[int], spare: bool = True) -> torch.Tensor:
    """One row: the stories with end-of-text after each, and room for their special tokens."""
    ids = [i for story in stories for i in (*story, EOT)]
    return torch.tensor([ids + [EOT] * (3 * len(stories) * spare)])


def random_rows(n: int, T: int, share: float = 0.1, seed: int = 0) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    return torch.from_numpy(np.where(rng.random((n, T)) < share, EOT, rng.integers(0, 256, (n, T))))


def pieces(row: torch.Tensor) -> list[list[int]]:
    """A row without end-of-text, which ends each piece but the last."""
    found = [[]]
    for i in row.tolist():
        if i == EOT:
            found.append([])
        else:
            found[-1].append(i)
    return found


def restored(piece: list[int]) -> list[int]:
    """The text of a piece, in its order."""
    if SUF not in piece:
        return piece
    assert [i for i in piece if i > EOT] == SPECIAL and piece[0] == SUF
    pre, mid = piece.index(PRE), piece.index(MID)
    return piece[pre + 1 : mid] + piece[mid + 1 :] + piece[1:pre]


def trainer(**changes) -> Trainer:
    """A trainer of a micro model on random data, with the three ids."""
    data = random_data()
    data = data._replace(tokenizer=data.tokenizer.with_special(FIM))
    cls = settings.with_parts(TrainConfig, objective_config=fim.Config)
    c = settings.build(cls, MICRO | dict(vocab_size=260, objective="fim") | changes)
    torch.manual_seed(c.seed)
    return Trainer(c, GPT(c.model), data)


# ----------------------------------------------------------------------------------------------------------
# Rearranging


@pytest.mark.parametrize("rate", [0.0, 0.5, 1.0])
def test_every_token_appears_once_and_in_order(rate):
    rng = random.Random(0)
    stories = [[rng.randrange(256) for _ in range(rng.choice((0, 1, 2, 3, 30)))] for _ in range(300)]
    [out] = fim.rearrange(rows := rows_of(*stories), EOT, SPECIAL, rate, (1, 2))
    assert out.dtype == torch.int64 and out.shape == rows[0].shape
    found = pieces(out)[: len(stories)]
    assert [restored(piece) for piece in found] == stories
    n, text = sum(SUF in piece for piece in found), sum(map(bool, stories))
    assert abs(n - rate * text) <= 4 * math.sqrt(rate * (1 - rate) * text)
    assert all(SUF not in piece for piece, story in zip(found, stories, strict=True) if not story)


def test_cuts_are_uniform():
    """Of all pairs of places in a story of three tokens, also at its ends."""
    rows = torch.cat([rows_of([i % 256, i // 256, 7]) for i in range(4000)])
    cuts = Counter()
    for piece in (pieces(row)[0] for row in fim.rearrange(rows, EOT, SPECIAL, 1.0, (0,))):
        suffix, middle = piece.index(PRE) - 1, len(piece) - piece.index(MID) - 1
        cuts[3 - suffix - middle, 3 - suffix] += 1
    for a in range(4):
        for b in range(a, 4):
            p = (1 if a == b else 2) / 16
            assert abs(cuts[a, b] - 4000 * p) < 4.5 * math.sqrt(4000 * p * (1 - p)), (a, b)


def test_what_does_not_fit_is_cut_off_at_the_end():
    rows = random_rows(200, 33)
    for row, out in zip(rows, fim.rearrange(rows, EOT, SPECIAL, 0.7, (3, 4)), strict=True):
        before, (*whole, last) = pieces(row), pieces(out)
        assert len(out) == 33 and [restored(piece) for piece in whole] == before[: len(whole)]
        text = before[len(whole)]
        cuts = [(a, b) for b in range(len(text) + 1) for a in range(b + 1)]
        orders = [[SUF, *text[b:], PRE, *text[:a], MID, *text[a:b]] for a, b in cuts]
        assert any(order[: len(last)] == last for order in [text, *orders])


def test_rearranging_is_a_pure_function_of_seed_step_and_row():
    """And so equal for any number of processes and micro-batches."""
    rows = random_rows(8, 200)
    out = fim.rearrange(rows, EOT, SPECIAL, 0.5, (1, 2))
    assert torch.equal(fim.rearrange(rows[5:7], EOT, SPECIAL, 0.5, (1, 2)), out[5:7])
    for seed in ((1, 3), (2, 2), (2**63 - 1, 2)):
        other = fim.rearrange(rows, EOT, SPECIAL, 0.5, seed)
        assert not torch.equal(other, out)
        assert torch.equal(other, fim.rearrange(rows, EOT, SPECIAL, 0.5, seed))
    same = torch.stack([rows[0], torch.where(torch.arange(200) == 199, 7, rows[0])])
    changed = fim.rearrange(same, EOT, SPECIAL, 0.5, (1, 2))
    assert not torch.equal(changed[0, :150], changed[1, :150]), "rows that differ are cut differently"


# ----------------------------------------------------------------------------------------------------------
# The loss


@pytest.mark.parametrize("changes", [{}, {"pointer": True}, {"loss_chunk": 0}], ids=str)
def test_loss_equals_a_slow_formula(changes):
    t = trainer(**changes)
    model, (idx, targets) = t.model.double().eval(), next(t.micro_batches(3))
    loss, parts = t.objective(model, idx, targets, 3)
    rows = fim.rearrange(torch.cat((idx, targets[:, -1:]), 1), EOT, SPECIAL, 0.5, (t.config.seed, 3))
    nats = []
    for row in rows.tolist():
        for i in range(1, len(row)):
            if row[i] <= EOT:
                logits = model(torch.tensor([row[:i]]))[0][0, -1]
                nats.append(logits.logsumexp(0).item() - logits[row[i]].item())
    assert (rows >= SUF).sum() >= 6 and len(parts) == 1
    assert parts["loss"].item() == loss.item() == pytest.approx(np.mean(nats), abs=1e-10)


def test_stories_of_a_row_do_not_see_each_other_with_document_masking():
    t = trainer(cross_stories=False, separator=EOT, pointer=True, block_size=64)
    model = t.model.double().eval()
    rows = fim.rearrange(random_rows(3, 64), EOT, SPECIAL, 1.0, (0,))
    for row in rows:
        logits, at = model(row[None])[0][0], [0, *(row == EOT).nonzero().flatten().tolist(), 64]
        for begin, end in zip(at, at[1:], strict=False):
            if begin < end:
                alone = model(row[None, begin:end])[0][0]
                torch.testing.assert_close(logits[begin:end], alone, atol=1e-10, rtol=0)


def test_rate_0_is_plain_training_with_a_larger_vocabulary():
    a, b = trainer(fim_rate=0.0, dropout=0.1), trainer(dropout=0.1)
    b.objective, b.config = None, a.config
    for step in range(4):
        assert bit_equal(a.train_step(step), b.train_step(step))
    assert bit_equal(dict(a.model.state_dict()), dict(b.model.state_dict()))


def test_loss_of_random_bytes_is_not_below_their_entropy():
    """No order shows a token before it is predicted, to a new model or to one trained on such rows."""
    t = trainer(block_size=32, batch_size=32, learning_rate=0.01, fim_rate=0.9, pointer=True)
    rows = [random_rows(32, 33, share=0.05, seed=i) for i in range(60)]
    t.micro_batches = lambda step: [(rows[step][:, :-1], rows[step][:, 1:])]
    losses = [t.train_step(step)["loss"].item() for step in range(60)]
    assert np.mean(losses[-9:]) < losses[0] - 0.03, "it has learned the frequencies"
    for model in (t.model.eval(), trainer(block_size=32).model.eval()):
        nats = []
        for fresh in range(100, 140):
            tokens = random_rows(16, 33, share=0, seed=fresh)
            nats.append(t.objective(model, tokens[:, :-1], tokens[:, 1:], fresh)[0].item())
        assert np.mean(nats) > math.log(256) - 3 * np.std(nats) / math.sqrt(len(nats))


# ----------------------------------------------------------------------------------------------------------
# Special tokens


@pytest.fixture(scope="module")
def bpe() -> tokenizers.Tokenizer:
    return tokenizers.train_bpe(STORIES * 3, 300)


@pytest.fixture(params=["byte", "bpe"])
def plain(request, bpe) -> tokenizers.Tokenizer:
    return bpe if request.param == "bpe" else tokenizers.get("byte")


def test_special_tokens_follow_end_of_text_and_change_nothing_else(plain, tmp_path):
    special, n = plain.with_special(FIM), plain.vocab_size
    assert plain.with_special(()) is plain and special.with_special(FIM) is special
    assert plain.state().keys() == {"name", "ranks"}
    assert special.state() == plain.state() | {"special": [*FIM]}
    assert special.sha256 == plain.sha256 and special.eot == plain.eot and special.vocab_size == n + 3
    assert special.fim_ids() == [n, n + 1, n + 2]
    assert special.with_special(["<|x|>", FIM[0]]).special == [*FIM, "<|x|>"]
    assert special.decode([n, *plain.encode("a b"), n + 1, n + 2]) == "<|suffix|>a b<|prefix|><|middle|>"
    with pytest.raises(ValueError, match=f"{n + 3} is not a valid id of tokenizer {plain.name}"):
        special.decode([n + 3])
    for text in (*STORIES, "".join(FIM), "<|endoftext|>", " <|middle|> x"):
        assert special.encode(text) == plain.encode(text) and max(special.encode(text)) < plain.eot
        assert special.decode(special.encode(text)) == text
    texts = [*STORIES, "<|middle|><|endoftext|>"]
    assert np.array_equal(special.encode_stories(texts), plain.encode_stories(texts))
    again = tokenizers.from_state(special.state())
    assert again.state() == special.state() and again.tokens == special.tokens
    special.save(tmp_path / "special.json")
    assert tokenizers.load(tmp_path / "special.json", plain.name).state() == plain.state()
    plain.save(tmp_path / "plain.json")
    added = json.loads((tmp_path / "plain.json").read_text())["added_tokens"]
    assert [token["content"] for token in added] == ["<|endoftext|>"]


def test_invalid_special_tokens(plain):
    for special in ([""], ["<|endoftext|>"], ["a"], ["x<", "x<"]):
        with pytest.raises(ValueError, match="special tokens are not empty, and differ"):
            tokenizers.from_state(plain.state() | {"special": special})
    for special in ("x", [1], {"a": "b"}, ["\0"]):
        with pytest.raises(ValueError, match="special"):
            tokenizers.from_state(plain.state() | {"special": special})
    assert tokenizers.from_state(plain.state() | {"special": None}).special == []
    with pytest.raises(ValueError, match="this model cannot fill in text"):
        plain.fill_prompt([1], [2])


def test_exports_have_the_special_tokens(bpe, tmp_path):
    special = bpe.with_special(FIM)
    model = random_model(special, tied=False)
    idx = torch.cat((torch.randint(0, 303, (1, 40)), torch.tensor([special.fim_ids()])), dim=1)
    ours = model(idx)[0].detach()
    to_llama2c(model, special, tmp_path / "m.bin")
    theirs = RunC(tmp_path / "m.bin")
    order = [special.tokens.index(token) for token in theirs.tokens]
    assert sorted(order) == list(range(303)) and order[1] == bpe.eot and order[-3:] == special.fim_ids()
    actual = torch.from_numpy(theirs.logits([order.index(i) for i in idx[0].tolist()])).float()
    torch.testing.assert_close(actual, ours[0][:, order], rtol=0, atol=1e-5)
    text = f" a{''.join(FIM)}"
    assert [order[i] for i in theirs.encode(text[1:])[1:]] == special.encode(text)

    to_hf(model, special, tmp_path / "hf")
    theirs, tokenizer = open_hf(tmp_path / "hf")
    torch.testing.assert_close(theirs(idx).logits, ours, rtol=0, atol=1e-5)
    assert len(tokenizer) == 303 and tokenizer.convert_tokens_to_ids([*FIM]) == special.fim_ids()
    assert tokenizer(text).input_ids == [special.eot, *special.encode(text)]
    assert tokenizer.decode([*special.fim_ids(), *bpe.encode("Tom")], skip_special_tokens=True) == "Tom"
    with pytest.warns(UserWarning, match="special tokens left out"):
        loaded, left = from_hf(tmp_path / "hf")
    assert left.state() == bpe.state()
    text = idx.clamp(max=299)
    torch.testing.assert_close(loaded(text)[0], model(text)[0][..., :300])


# ----------------------------------------------------------------------------------------------------------
# Runs


def test_resume_is_bitwise_exact(main, tmp_path):
    changes = RUN | dict(dropout=0.1, fim_rate=0.8)
    assert main("whole", **changes) == 0
    assert main("parts", **changes, stop_after=7) == 143
    assert main("parts", "--resume", micro=False) == 0
    assert metrics("whole") == metrics("parts")
    assert bit_equal(run_state("whole"), run_state("parts"))
    assert run_state("parts")["tokenizer"]["special"] == [*FIM]
    assert run_state("parts")["model_config"]["vocab_size"] == 260


def test_data_and_evaluation_are_those_of_the_plain_tokenizer(main, corpus, tmp_path, capsys):
    before = {path.name: path.read_bytes() for path in (corpus / "mini" / "byte").iterdir()}
    assert main("fim", **RUN) == 0
    assert before == {path.name: path.read_bytes() for path in (corpus / "mini" / "byte").iterdir()}
    model, tokenizer = checkpoint.load("fim")
    data = load_data(corpus / "mini" / "byte", tokenizer=tokenizer)
    assert data.tokenizer is tokenizer and memorization.vocabulary(data) == memorization.vocabulary(
        load_data(corpus / "mini" / "byte")
    )
    assert evaluate.main(["fim"]) == 0
    nats = score.total(model, [data.val.astype(np.int64)], EOT)[0]
    assert f"{nats / math.log(2) / len(data.val):.4f}" in capsys.readouterr().out, "bits per byte"


def test_init_from_adds_the_ids_once_and_a_plain_run_keeps_them(main, corpus, tmp_path):
    """318 ids are 320 rows, 321 are 384."""
    Path("stories.txt").write_text("\n\n".join(f"{i} {text}" for i, text in enumerate(STORIES * 9)))
    own = dict(data_dir="data", dataset="stories", tied=False, max_iters=3, learning_rate=1e-9)
    own |= dict(tokenizer="bpe318", source="stories.txt", warmup_iters=0)
    assert main("plain", **own) == 0
    del own["tokenizer"], own["tied"]
    assert main("fim", **own, init_from="plain", objective="fim") == 0
    assert main("fim2", **own, init_from="fim", objective="fim") == 0
    assert main("last", **own, init_from="fim") == 0
    states = [checkpoint.read(Path(run, "latest.pt")) for run in ("plain", "fim", "fim2", "last")]
    sizes = [state["model_config"]["vocab_size"] for state in states]
    assert sizes == [318, 321, 321, 321]
    for name in ("embedder.tokens.weight", "head.linear.weight"):
        tables = [state["model"][name] for state in states]
        assert [len(table) for table in tables] == [320, 384, 384, 384]
        torch.testing.assert_close(tables[1][:318], tables[0][:318], rtol=0, atol=1e-6)
        assert tables[1][318:321].std() > 0.01
        torch.testing.assert_close(tables[2][:321], tables[1][:321], rtol=0, atol=1e-6)
    assert [bool(state["tokenizer"].get("special")) for state in states] == [False, True, True, True]
    Path("other.txt").write_text("\n\n".join(f"{i} {text}" for i, text in enumerate(STORIES * 40)))
    assert main("other", **own | dict(init_from="fim", dataset="other", source="other.txt")) == 0
    [folder] = Path("data", "other").iterdir()
    assert json.loads((folder / "meta.json").read_text())["tokenizer"]["vocab_size"] == 318
    assert main("other", "--resume", micro=False, data_dir="data", max_iters=4) == 0
    assert checkpoint.load("other")[1].special == [*FIM]


def test_refusals(main, tmp_path):
    assert main("fim", **RUN, fim_rate=1.5) == 2 and "fim_rate must be between 0 and 1" in main.stderr
    assert main("fim", **RUN, compile="True") == 2 and "compile" in main.stderr
    for name in ("patches", "thoughts"):
        shape = {key: MICRO[key] for key in ("dataset", "tokenizer", "batch_size", "device", "dtype")}
        assert main("fim", **shape, **RUN, architecture=name, micro=False) == 2
        assert "not of 260 ids" in main.stderr and "leave out objective=fim" in main.stderr
    assert not Path("fim").exists()


def test_other_architectures_fill_in(main):
    shape = {key: x for key, x in MICRO.items() if key not in ("n_layer", "n_head", "n_embd")}
    assert main("fim", **shape | RUN, architecture="bigram", micro=False) == 0
    assert sample.main(["fim", "--prefix", "a", "--suffix", "b", "--max_new_tokens", "3"]) == 0


# ----------------------------------------------------------------------------------------------------------
# sample.py --prefix --suffix


@pytest.fixture(scope="module")
def filler(tmp_path_factory) -> Path:
    """A run that has learned that " bb" is between "aa" and " cc", and " dd" before " ee"."""
    byte, folder = tokenizers.get("byte").with_special(FIM), tmp_path_factory.mktemp("run") / "fim"
    torch.manual_seed(0)
    c = GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=40, vocab_size=260)
    model, folder_state = GPT(c), {"model_config": asdict(c), "tokenizer": byte.state()}
    rows = ((b" cc", b" bb"), (b" ee", b" dd"))
    rows = [[EOT, *byte.fill_prompt(b"aa", suffix), *middle, EOT] for suffix, middle in rows]
    tokens, optimizer = torch.tensor(rows), torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(60):
        model(tokens[:, :-1], tokens[:, 1:])[1].backward()
        optimizer.step()
        optimizer.zero_grad()
    folder.mkdir()
    checkpoint.save(folder / "best.pt", folder_state | {"model": model.state_dict()})
    return folder


def test_sample_writes_the_middle(filler, capsys):
    for suffix, middle in ((" cc", " bb"), (" ee", " dd")):
        words = [str(filler), "--prefix", "aa", "--suffix", suffix]
        assert sample.main([*words, "--temperature", "0"]) == 0
        out, err = capsys.readouterr()
        assert out == f"aa{middle}{suffix}\n" and "3 tokens in" in err
    assert sample.main([*words, "--num_samples", "2", "--top_k", "1"]) == 0
    assert capsys.readouterr().out == "aa dd ee\n---------------\naa dd ee\n"
    assert sample.main([*words, "--top_k", "1", "--stop", "d"]) == 0
    assert capsys.readouterr().out == "aa  ee\n"
    for words, ends in ((["--prefix", "ab"], ("ab", "\n")), (["--suffix", "cd"], ("", "cd\n"))):
        assert sample.main([str(filler), *words, "--max_new_tokens", "5"]) == 0
        out = capsys.readouterr().out
        assert out.startswith(ends[0]) and out.endswith(ends[1])


def test_the_middle_ends_where_the_context_does(filler, capsys, recwarn):
    """A window that slides would lose the suffix; the prompt has 33 tokens with end-of-text."""
    model, byte = checkpoint.load(filler)
    ids = byte.fill_prompt(b"x" * 14, b"y" * 15)
    words = [str(filler), "--prefix", "x" * 14, "--suffix", "y" * 15, "--temperature", "0", "--stop", "never"]
    assert sample.main(words) == 0
    [expected] = generate(model, [ids], 8, chain(temperature=0, top_p=1), eot=EOT)
    middle = capsys.readouterr().out.removeprefix("x" * 14).removesuffix("y" * 15 + "\n")
    assert middle.encode() == byte.decode_bytes(expected) and len(expected) == 8
    assert sample.main([str(filler), "--prefix", "x" * 30, "--suffix", "y" * 7]) == 2
    assert "prefix and suffix take 41 tokens, and the context has 40" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words,message",
    [
        (["--prompt", "a"], "--prefix and --suffix write a middle: leave out --prompt and --interactive"),
        (["--interactive"], "--prefix and --suffix write a middle: leave out --prompt and --interactive"),
    ],
)
def test_sample_refuses_a_prompt_beside_a_middle(words, message, filler, capsys):
    for own in (["--suffix", "b"], ["--prefix", "a"]):
        assert sample.main([str(filler), *own, *words]) == 2
        assert message in capsys.readouterr().err


def test_sample_refuses_models_that_cannot_fill_in(main, capsys):
    assert main("plain", max_iters=1) == 0
    assert sample.main(["plain", "--suffix", "b"]) == 2
    assert "this model cannot fill in text: that takes a run with --objective=fim" in capsys.readouterr().err
    assert sample.main(["hf:gpt2", "--suffix", "b"]) == 2
    assert "--suffix: for models of this project only" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------------
# python experiments/fim.py RUN


@pytest.fixture(scope="module")
def toys(tmp_path_factory) -> tuple[Path, Path]:
    """A random model for toystories in bpe, and their data_dir."""
    folder = tmp_path_factory.mktemp("toys")
    prepare.prepare("toystories", "bpe1000", stories=500, data_dir=folder / "data")
    data = load_data(folder / "data" / "toystories" / "bpe1000")
    tokenizer = data.tokenizer.with_special(FIM)
    model = random_model(tokenizer, n_layer=1, n_head=2, n_embd=16, block_size=400)
    trained = {"data_dir": str(folder / "data"), "dataset": "toystories", "tokenizer": "bpe1000"}
    state = {"model": model.state_dict(), "model_config": asdict(model.config), "train_config": trained}
    (folder / "run").mkdir()
    checkpoint.save(folder / "run" / "best.pt", state | {"tokenizer": tokenizer.state()})
    return folder / "run", folder / "data"


def test_parts_that_are_removed():
    text = '"Who?" asked Mom. "Mr. Green and Mia," said Mia.\nThey had a teddy bear and a boat! The end.'
    found = {kind: fim.re.findall(pattern, text) for kind, pattern in fim.patterns().items()}
    assert found["name"] == ["Mr. Green", " Mia", " Mia"] and found["object"] == [" teddy bear", " boat"]
    assert found["sentence"] == [
        '"Who?" asked Mom.',
        ' "Mr. Green and Mia," said Mia.',
        "\nThey had a teddy bear and a boat!",
        " The end.",
    ]
    for i, (text, _) in zip(range(50), toystories.stories(3), strict=False):
        assert "".join(fim.re.findall(fim.patterns()["sentence"], text)) == text, i


def test_measured_shares_are_those_of_valid_stories(toys, monkeypatch):
    """With the true middles all stories are valid, with others none; every prompt is that of a story."""
    run, data_dir = toys
    texts = fim.tasks.validation_texts(load_data(data_dir / "toystories" / "bpe1000"))
    tokenizer = checkpoint.load(run)[1]
    suffix_id, prefix_id, middle_id = tokenizer.fim_ids()
    removed = []

    def true_middles(model, prompts, n, samplers=(), *, eot):
        assert not samplers and n >= 60
        for prompt in prompts:
            pre = prompt.index(prefix_id)
            assert prompt[0] == suffix_id and prompt[-1] == middle_id
            suffix, prefix = tokenizer.decode(prompt[1:pre]), tokenizer.decode(prompt[pre + 1 : -1])
            [text] = [t for t in texts if t.startswith(prefix) and t.endswith(suffix)]
            removed.append(text[len(prefix) : len(text) - len(suffix)])
        return [tokenizer.encode(middle) for middle in removed[-len(prompts) :]]

    monkeypatch.setattr(fim, "generate", true_middles)
    figures = [figure for task, figure in fim.measure(str(run), 20) if task == "toystories"]
    kinds = [f.name.removeprefix("valid with a new ") for f in figures]
    assert kinds == ["name", "object", "sentence"]
    assert all(f.value == 1 and f.percent and f.low < 1 and 0 < f.n <= 20 for f in figures)
    assert len(removed) == sum(f.n for f in figures) and figures[2].n == len(texts)
    monkeypatch.setattr(fim, "generate", lambda model, prompts, *args, **kw: [[65]] * len(prompts))
    assert [f.value for task, f in fim.measure(str(run), 20) if task == "toystories"] == [0, 0, 0]


@torch.no_grad()
def test_measured_nats_are_those_of_the_middle(toys, monkeypatch):
    monkeypatch.setattr(fim, "generate", lambda model, prompts, *args, **kw: [[]] * len(prompts))
    run, data_dir = toys
    model, tokenizer = checkpoint.load(run)
    texts = fim.tasks.validation_texts(load_data(data_dir / "toystories" / "bpe1000"))[:5]
    rng, nats, count = random.Random(0), [0.0, 0.0], 0
    for ids in map(tokenizer.encode, texts):
        a, b = sorted(rng.sample(range(len(ids) + 1), 2))
        count += b - a
        before = [tokenizer.eot, *tokenizer.fill_prompt(ids[:a], ids[b:])], [tokenizer.eot, *ids[:a]]
        for k, prefix in enumerate(before):
            logits = model(torch.tensor([prefix + ids[a:b]]))[0][0, len(prefix) - 1 : -1]
            nats[k] += F.cross_entropy(logits, torch.tensor(ids[a:b]), reduction="sum").item()
    found = [f.value for task, f in fim.measure(str(run), 5) if task == "middle"]
    expected = nats[0] / count, nats[1] / count, (nats[1] - nats[0]) / count
    assert found == pytest.approx(expected, abs=1e-5)


def test_table_of_a_run(toys, tmp_path):
    out = run_script(ROOT / "experiments" / "fim.py", toys[0], "--limit", "3", cwd=tmp_path).stdout
    lines = [line.split("  ")[0] for line in out.splitlines()]
    assert lines == ["task", *["middle"] * 3, *["toystories"] * 3]
