"""evaluate.py and nanostlm/tasks.py against simple references."""

import copy
import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

import evaluate
import prepare
from model import GPT, GPTConfig
from nanostlm import checkpoint, corruptions, score, stats, tasks, tokenizer, toystories
from nanostlm import data as datasets
from nanostlm.fast_decoding import quantize
from nanostlm.memorization import vocabulary

BYTE = tokenizer.get("byte")
EOT = BYTE.eot


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """80 toystories as bytes, one or two of them for validation."""
    folder = tmp_path_factory.mktemp("data")
    return datasets.load_data(prepare.prepare("toystories", "byte", stories=80, data_dir=folder))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = GPTConfig(
        n_layer=1, n_head=2, n_embd=16, block_size=1024, vocab_size=257, init="fan_in", tied=False
    )
    return GPT(config).eval()


@pytest.fixture
def run(tmp_path, model, data, monkeypatch):
    """The path of a checkpoint of the model that names the data as its training data."""
    monkeypatch.chdir(tmp_path)
    trained = dict(
        data_dir=str(data.folder.parent.parent), dataset="toystories", tokenizer="byte", cross_stories=True
    )
    state = {
        "model": model.state_dict(),
        "model_config": dataclasses.asdict(model.config),
        "train_config": trained,
    }
    path = tmp_path / "out" / "toys" / "best.pt"
    path.parent.mkdir(parents=True)
    checkpoint.save(path, state | {"tokenizer": BYTE.state()})
    return path


def stories_of(data) -> list[list[int]]:
    """The validation stories, each with its end-of-text."""
    ids, stories = data.val.tolist(), []
    while ids:
        end = ids.index(EOT) + 1
        stories.append(ids[:end])
        ids = ids[end:]
    return stories


@torch.no_grad()
def reference_nats(model, ids: list[int]) -> float:
    """Negative log-likelihood of ids in windows of block_size, with end-of-text before the first."""
    T, total = model.config.block_size, 0.0
    for start in range(0, len(ids), T):
        targets = torch.tensor(ids[start : start + T])
        inputs = torch.tensor([EOT, *ids][start : start + len(targets)])
        logp = model(inputs[None])[0][0].log_softmax(dim=-1)
        total -= logp.gather(1, targets[:, None]).sum().item()
    return total


def subject_of(model, data) -> tasks.Subject:
    return tasks.Subject("model", model, data.tokenizer, data, tasks.validation_texts(data), "val.bin")


def values(result) -> dict[str, float]:
    return {figure.name: figure.value for figure in result.figures}


def test_validation_loss_matches_reference(model, data):
    nats, bpb, n_tokens = tasks.validation_loss(model, data, rows=2)
    assert n_tokens == len(data.val)
    assert nats == pytest.approx(reference_nats(model, data.val.tolist()) / n_tokens, rel=1e-5)
    assert bpb == pytest.approx(nats / math.log(2), rel=1e-9)  # each token is a byte


@pytest.mark.parametrize("stride", [0, 100])
def test_bpb_matches_reference(model, data, stride):
    model = GPT(dataclasses.replace(model.config, block_size=256)).eval()
    subject, ids = subject_of(model, data), data.val.tolist()
    result = tasks.bpb(subject, stride=stride, rows=3)
    if stride:
        nats = score.score(model, [ids], EOT, stride=stride)[0].sum()
    else:
        nats = reference_nats(model, ids)
        assert values(result)["bits per byte"] == pytest.approx(
            tasks.validation_loss(model, data)[1], rel=1e-5
        )
    n_chars = sum(len(text) + 1 for text in subject.texts)
    expected = {
        "bits per byte": nats / math.log(2) / len(ids),
        "bits per character": nats / math.log(2) / n_chars,
        "nats per token": nats / len(ids),
        "perplexity per token": math.exp(nats / len(ids)),
    }
    assert values(result) == pytest.approx(expected, rel=1e-5)
    assert sum(item["nats"] for item in result.items) == pytest.approx(nats, rel=1e-5)
    assert f"{len(ids):,} tokens" in result.notes[0] and f"stride {stride or 256}" in result.notes[0]
    first = tasks.bpb(subject, stride=stride, limit=1)
    assert first.figures[0].n == 1 and len(first.items) == 1


def test_bpb_counts_bytes_and_characters(model, data):
    subject = subject_of(model, data)._replace(texts=["äöü", "a"])
    figures = values(tasks.bpb(subject))
    assert figures["bits per character"] / figures["bits per byte"] == pytest.approx((7 + 2) / (4 + 2))


def test_batches_of_1_and_64_give_the_same(model, data):
    texts = [text for text, _ in (next(toystories.stories(5, i)) for i in range(3))]
    subject = subject_of(model, data)._replace(texts=texts)
    for task in (tasks.bpb, tasks.progression):
        one, many = (values(task(subject, limit=3, rows=rows)) for rows in (1, 64))
        assert one == pytest.approx(many, abs=1e-5)


@pytest.mark.parametrize("block_size", [1024, 64])
def test_grammar_compares_with_the_entropy(model, data, block_size):
    model = GPT(dataclasses.replace(model.config, block_size=block_size)).eval()
    whole = [story for story in stories_of(data) if len(story) <= block_size]
    result = tasks.grammar(subject_of(model, data), limit=1, rows=2)
    figures = values(result)
    assert all(figure.n == len(whole) for figure in result.figures[:3])
    if not whole:
        assert all(math.isnan(figure.value) for figure in result.figures[:3])
        return
    bits = math.log(2) * sum(map(len, whole))
    bpb = sum(reference_nats(model, story) for story in whole) / bits
    entropy = -sum(toystories.check(BYTE.decode(story[:-1])).logprob for story in whole) / bits
    assert figures["bits per byte of whole stories"] == pytest.approx(bpb, rel=1e-5)
    assert figures["their entropy"] == pytest.approx(entropy, rel=1e-9)
    assert figures["excess over the entropy"] == pytest.approx(bpb / entropy - 1, rel=1e-4)


def test_grammar_counts_valid_stories(model, data, monkeypatch):
    valid = BYTE.decode(stories_of(data)[0][:-1])
    texts = [valid, valid + " Nonsense.", "Nonsense.", valid]
    monkeypatch.setattr(tasks, "generate_stories", lambda *args, **options: texts)
    result = tasks.grammar(subject_of(model, data), limit=4)
    assert values(result)["valid stories"] == 0.5 and result.figures[-1].n == 4
    assert all(toystories.check(text).rule in result.notes[-1] for text in texts[1:3])
    with pytest.raises(ValueError, match="known entropy"):
        tasks.grammar(subject_of(model, data)._replace(data=None))


def test_default_is_the_newest_run_on_its_own_data(run, model, data, capsys):
    assert evaluate.main([]) == 0
    out = capsys.readouterr().out
    nats, bpb, n_tokens = tasks.validation_loss(model, data)
    first, _, third = (line.split() for line in out.splitlines()[1:4])
    assert first[:5] == ["bpb", "bits", "per", "byte", f"{bpb:.4f}"]
    assert third[:5] == ["bpb", "nats", "per", "token", f"{nats:.4f}"]
    assert f"{n_tokens:,} tokens" in out and f"{data.folder}/val.bin" in out and "valid stories" in out
    assert evaluate.main(["--out_dir", str(run), "--data", str(data.folder), "--rows=3", "--dtype=int8"]) == 0
    line = next(x for x in capsys.readouterr().out.splitlines() if "nats per token" in x)
    int8 = float(line.split()[4])
    quantized = copy.deepcopy(model)
    quantize(quantized)
    assert int8 == pytest.approx(tasks.validation_loss(quantized, data, 3)[0], abs=1e-4) != round(nats, 4)
    assert int8 == pytest.approx(nats, rel=0.02)


# ----------------------------------------------------------------------------------------------------------
# BLiMP


def write_blimp(folder: Path, **paradigms) -> Path:
    """A folder of paradigms: name -> (phenomenon, pairs of an acceptable and an unacceptable sentence)."""
    folder.mkdir()
    for uid, (term, pairs) in paradigms.items():
        keys = ("sentence_good", "sentence_bad", "linguistics_term", "UID")
        lines = [json.dumps(dict(zip(keys, (*pair, term, uid), strict=True))) for pair in pairs]
        (folder / f"{uid}.jsonl").write_text("\n".join(lines))
    return folder


PAIRS = [
    ("The dogs run.", "The dogs runs."),
    ("A dog runs.", "A dog run."),
    ("Mia saw it.", "Mia sees it it."),
]


@pytest.fixture
def blimp(tmp_path) -> Path:
    return write_blimp(
        tmp_path / "blimp", one=("verbs", PAIRS), two=("verbs", PAIRS[:1]), three=("words", PAIRS[1:])
    )


def test_blimp_matches_sentence_by_sentence_scores(model, data, blimp):
    result = tasks.blimp(subject_of(model, data), blimp)
    expected = []
    for sentences in PAIRS:
        good, bad = (score.loglikelihood(model, [EOT], list(text.encode())) for text in sentences)
        expected.append(float(good > bad))
    one, two, three = np.mean(expected), expected[0], np.mean(expected[1:])
    figures = values(result)
    assert figures["one"] == one and figures["two"] == two and figures["three"] == three
    assert figures["verbs"] == pytest.approx((one + two) / 2) and figures["words"] == three
    assert figures["all paradigms"] == pytest.approx((one + two + three) / 3)
    assert len(result.items) == result.figures[0].n == 6
    assert tasks.blimp(subject_of(model, data), blimp, limit=1).figures[0].n == 3


def test_blimp_is_a_half_if_all_sentences_are_alike(data, blimp):
    """A tie counts as a half. The argmax of two equal scores would be the good sentence each time."""

    class Uniform(torch.nn.Module):
        config = GPTConfig(block_size=64, vocab_size=257)

        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(257))

        def forward(self, idx):
            return self.weight.expand(*idx.shape, -1), None

    pairs = write_blimp(blimp / "equal", same=("words", [("ab cd", "cd ab"), ("abc", "cba"), ("x y", "y x")]))
    result = tasks.blimp(tasks.Subject("", Uniform(), BYTE), pairs)
    assert {figure.value for figure in result.figures} == {0.5}
    assert stats.digits(result.figures[0].value, percent=True) == "50.0%"


def test_blimp_of_words_in_the_training_text(model, data, tmp_path):
    words = sorted(vocabulary(data)[0])
    known, unknown = max(words, key=len), "xyzzy"
    assert unknown not in words
    pairs = [(f"{known} {known}.", f"{known.title()}!"), (known, unknown), (f"{unknown} {known}", known)]
    result = tasks.blimp(subject_of(model, data), write_blimp(tmp_path / "words", a=("t", pairs)))
    assert [item["familiar"] for item in result.items] == [True, False, False]
    assert result.figures[1].n == 1
    alone = tasks.blimp(subject_of(model, data)._replace(data=None), tmp_path / "words")
    assert len(alone.figures) == len(result.figures) - 1 and "without --data" in alone.notes[-1]


@pytest.mark.parametrize(
    "content, message",
    [
        (b"not json", "JSONDecodeError"),
        (b'{"UID": "x"}', "sentence_good is missing"),
        (b"\xff", "UTF-8"),
        (b"", ""),
    ],
)
def test_damaged_blimp_files_are_named(run, tmp_path, content, message, capsys):
    folder = tmp_path / "blimp"
    folder.mkdir()
    if content:
        (folder / "bad.jsonl").write_bytes(content)
    assert evaluate.main([str(run), "--tasks=blimp", f"--blimp={folder}"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and ("bad.jsonl" in err or not content)


# ----------------------------------------------------------------------------------------------------------
# Story progression


def test_progression_matches_pair_by_pair_scores(model, data):
    texts = [text for text, _ in (next(toystories.stories(5, i)) for i in range(4))]
    result = tasks.progression(subject_of(model, data)._replace(texts=texts), seed=3)
    names, parts = corruptions.known_names(texts), [corruptions.sentences(text) for text in texts]
    halves = [("".join(part[: len(part) // 2]), "".join(part[len(part) // 2 :])) for part in parts]

    def nats_per_byte(prefix, text):
        ids = [*text.encode(), EOT]
        return -score.loglikelihood(model, [EOT, *prefix.encode()], ids) / len(ids)

    for name in ("6-grams shuffled", "names swapped", "truncated"):
        margins = []
        for i, (prefix, real) in enumerate(halves):
            other = halves[(i + 1) % 4][1]
            if (corrupted := corruptions.corrupt(name, real, f"3 {i}", other, names)) is not None:
                margins.append(nats_per_byte(prefix, corrupted) - nats_per_byte(prefix, real))
        assert values(result)[name] == pytest.approx(np.mean([x > 0 for x in margins]))
        assert values(result)[f"{name}: nats per byte more"] == pytest.approx(np.mean(margins), abs=1e-5)
    assert result.figures[0].n == 4 and len(result.items) <= 4 * (1 + len(corruptions.CORRUPTIONS))


def test_shorter_ngrams_are_easier_to_tell(tmp_path):
    """Of a byte model that has only learned which bytes follow each other."""
    data = datasets.load_data(prepare.prepare("toystories", "bpe400", stories=300, data_dir=tmp_path))
    counts = torch.full((400, 400), 0.1)
    ids = torch.from_numpy(data.train.astype(np.int64))
    counts.index_put_((ids[:-1], ids[1:]), torch.ones(len(ids) - 1), accumulate=True)

    class Bigram(torch.nn.Module):
        config = GPTConfig(block_size=512, vocab_size=400)

        def __init__(self):
            super().__init__()
            self.logits = torch.nn.Embedding.from_pretrained(counts.log())

        def forward(self, idx):
            return self.logits(idx), None

    texts = tasks.validation_texts(data) + [
        text for text, _ in (next(toystories.stories(5, i)) for i in range(20))
    ]
    figures = values(tasks.progression(tasks.Subject("", Bigram(), data.tokenizer, data, texts)))
    more = [figures[f"{n}-grams shuffled: nats per byte more"] for n in (2, 3, 6, 12)]
    assert more == sorted(more, reverse=True) and more[-1] > 0
    assert figures["3-grams shuffled"] >= figures["12-grams shuffled"]


def test_progression_needs_stories_of_four_sentences(model, data):
    with pytest.raises(ValueError, match="four or more sentences"):
        tasks.progression(subject_of(model, data)._replace(texts=["One. Two. Three."] * 5))
    with pytest.raises(ValueError, match="needs texts"):
        tasks.progression(tasks.Subject("", model, BYTE))


# ----------------------------------------------------------------------------------------------------------
# The command line


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--out_dir", "nowhere"], "no checkpoint at nowhere"),
        (["--data", "nowhere"], "nowhere"),
        (["--data", "other/toystories/bpe264"], "was prepared with another tokenizer"),
        (["--rows", "0"], "rows must be between 1 and 4,096, not 0"),
        (["--row", "4"], "there is no option '--row'; did you mean '--rows'?"),
        (["--dtype", "float8"], "--dtype"),
        (["--tasks", "bpb,nothing"], "there is no task 'nothing': there are bpb, "),
        (["--tasks", "probe"], "there is no task 'probe'"),
        (["--tasks", "probe:"], "there is no task 'probe:'"),
        (["--tasks", "bpb:x"], "there is no task 'bpb:x'"),
        (["--tasks", "blimp"], "needs --blimp DIR"),
        (["--tasks", "blimp", "--blimp", "."], "has no .jsonl files"),
        (["--limit", "0"], "limit must be 1 or more"),
        (["--stride", "2000"], "stride must be between 0 and block_size=1024"),
        (["--text", "nowhere.txt"], "there is no file nowhere.txt"),
        (["--text", "latin1.txt"], "latin1.txt is not UTF-8 text"),
        (["--text", "empty.txt"], "empty.txt has no text"),
        (["--json", "no/such.json"], "there is no folder no for --json"),
        (["--sweep"], "--sweep belongs to --tasks stories"),
        (["--items"], "--items belongs to --json"),
    ],
)
def test_user_error_prints_one_line_and_returns_2(run, argv, message, capsys):
    Path("latin1.txt").write_bytes("Käse".encode("latin-1"))
    Path("empty.txt").write_text("\n\n")
    if "bpe264" in argv[-1]:
        prepare.prepare("toystories", "bpe264", stories=40, data_dir="other")
        capsys.readouterr()
    assert evaluate.main(argv) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and message in err and err.count("\n") == 1


def test_checkpoint_without_data_needs_an_option(tmp_path, model, data, blimp, capsys):
    state = {"model": model.state_dict(), "model_config": dataclasses.asdict(model.config)}
    checkpoint.save(tmp_path / "model.pt", state | {"tokenizer": BYTE.state()})
    path = str(tmp_path / "model.pt")
    assert evaluate.main([path]) == 2
    assert "pass --data or --text" in capsys.readouterr().err
    assert evaluate.main([path, "--data", str(data.folder)]) == 0
    assert evaluate.main([path, "--tasks=blimp", f"--blimp={blimp}"]) == 0


def test_text_file_takes_the_place_of_validation_stories(run, model, data, tmp_path, capsys):
    file, texts = tmp_path / "mine.md", ["One story. Ä.", "And\nanother one."]
    file.write_text("\n<|endoftext|>\n".join(texts), encoding="utf-8")
    assert evaluate.main([str(run), f"--text={file}", "--json=figures.json", "--items"]) == 0
    assert f"of {file}; windows" in capsys.readouterr().out
    [found] = json.loads(Path("figures.json").read_text()).values()
    assert list(found) == ["bpb"], "the entropy of other texts is unknown"
    [first, *_], items = found["bpb"]["figures"], found["bpb"]["items"]
    ids = [i for text in texts for i in (*text.encode(), EOT)]
    assert first["value"] == pytest.approx(reference_nats(model, ids) / math.log(2) / len(ids), rel=1e-5)
    assert first["n"] == 2 and [item["bytes"] for item in items] == [15, 17]


def test_several_runs_have_a_column_each_and_a_comparison(main, capsys):
    assert main("a") == 0 and main("b", n_layer=1, max_iters=12) == 0
    assert evaluate.main(["a", "b", "--plot", "both.png"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["task", "figure", "a/best.pt", "b/best.pt"]
    *_, head, first, second = lines
    assert head.split()[:3] == ["run", "max_iters", "n_layer"] and head.endswith("bits per byte")
    assert first.split()[:3] == ["a", "24", "2"] and second.split()[:3] == ["b", "12", "1"]
    assert "1,536" in first and "768" in second, "tokens of 24 and 12 updates"
    assert Path("both.png").read_bytes().startswith(b"\x89PNG")


def test_tasks_and_device_options(run, capsys):
    assert evaluate.main([str(run), "--tasks=bpb", "--device=cpu"]) == 0
    out = capsys.readouterr().out
    assert "bits per byte" in out and "valid stories" not in out
    assert evaluate.main([str(run), "--tasks=bpb", "--tasks=grammar", "--limit=3"]) == 0
    out = capsys.readouterr().out
    assert "bits per byte" in out and "valid stories" in out
    assert evaluate.main([str(run), "--device=tpu"]) == 2
    assert "device must be" in capsys.readouterr().err


def test_the_training_words_are_those_of_the_run(main, blimp, capsys):
    """A run with stories=N has not seen the others."""
    assert main("few", stories=2, max_iters=2) == 0
    subject, _, _ = evaluate.load("few", evaluate.parse(["few"]))
    assert subject.data.meta["train"]["stories"] == 2


def test_tokenizer_is_read_from_the_checkpoint(main, monkeypatch):
    """So GPT-2's vocabulary, for example, need not be available."""
    assert main("run", max_iters=2) == 0

    def unreachable(name):
        raise tokenizer.Unreachable("no network")

    monkeypatch.setattr(tokenizer, "get", unreachable)
    assert evaluate.main(["run"]) == 0


def test_ctrl_c_exits_with_130_and_prints_what_is_done(run, monkeypatch, capsys):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(tasks, "progression", interrupted)
    argv = [str(run), "--json=figures.json"]
    assert evaluate.main([*argv, "--tasks=progression"]) == 130
    assert capsys.readouterr() == ("", "") and not Path("figures.json").exists()
    assert evaluate.main([*argv, "--tasks=bpb,progression"]) == 130
    out, err = capsys.readouterr()
    assert "bits per byte" in out and err == ""
    assert [list(tasks) for tasks in json.loads(Path("figures.json").read_text()).values()] == [["bpb"]]
