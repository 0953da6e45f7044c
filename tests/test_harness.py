"""lm_eval tasks: the adapter against the harness' own HFLM, tasks from local files, figures, errors."""

import json
import math
import random
import runpy
import sys
import time
from importlib.util import find_spec
from types import SimpleNamespace
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from conftest import ROOT

from model import GPT, GPTConfig
from nanostlm import harness, score, stats, tokenizer

pytest.importorskip("lm_eval", reason="needs lm_eval: pip install -r requirements-eval.txt")
TASKS = ROOT / "tests" / "lm_eval_tasks"
WORDS = "the cat sat on a mat and saw the dog in the park with Mia 🙂 é ß 猫 Ω".split()


@pytest.fixture(scope="module")
def subject() -> SimpleNamespace:
    """A random model whose predictions are far from uniform, with a BPE of 300 ids and a window of 48."""
    rng = random.Random(0)
    tok = tokenizer.train_bpe([" ".join(rng.choices(WORDS, k=40)) for _ in range(20)], 300)
    torch.manual_seed(0)
    shape = dict(n_layer=2, n_head=2, n_embd=32, block_size=48, vocab_size=tok.vocab_size)
    model = GPT(GPTConfig(**shape)).eval()
    for p in model.parameters():
        p.data *= 3
    return SimpleNamespace(name="random", model=model, tokenizer=tok)


@pytest.fixture(scope="module")
def hflm(subject, tmp_path_factory):
    """The harness' own model, on an export of ours. It imports accelerate, but does not use it here."""
    transformers = pytest.importorskip("transformers")
    from nanostlm.formats import hf

    folder = tmp_path_factory.mktemp("exported")
    assert hf.to_hf(subject.model, subject.tokenizer, folder) == "LlamaForCausalLM"
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    with pytest.MonkeyPatch.context() as patch, harness.quiet():
        if not find_spec("accelerate"):
            for name in ("accelerate", "accelerate.utils"):
                patch.setitem(sys.modules, name, MagicMock())
        from lm_eval.models.huggingface import HFLM

        return HFLM(pretrained=model, add_bos_token=True, batch_size=1)


def adapter(subject, **options):
    return harness.adapter_class()(subject.model, subject.tokenizer, **options)


def requests(kind: str, *arguments: tuple) -> list:
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, args, i) for i, args in enumerate(arguments)]


def text(rng: random.Random, low: int, high: int) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(low, high)))


# ----------------------------------------------------------------------------------------------------------
# The adapter


def test_loglikelihoods_and_greediness_are_those_of_hflm(subject, hflm):
    rng, T, pairs = random.Random(1), subject.model.config.block_size, []
    for i in range(200):
        context = "" if i % 10 == 0 else text(rng, 1, 60 if i % 3 else 8) + " " * (i % 7 == 0)
        pairs.append((context, (" " if context else "") + text(rng, 1, 6)))
    lm = adapter(subject, rows=3)
    for i in range(0, 200, 4):  # continuations that the model itself writes are greedy
        [end] = lm.generate_until(requests("", (pairs[i][0], {"max_gen_toks": 3})))
        ids = [subject.tokenizer.encode(pairs[i][0] + more) for more in ("", end)]
        if end and ids[1][: len(ids[0])] == ids[0]:
            pairs[i] = pairs[i][0], end
    sizes = [len(lm.tok_encode(context)) for context, _ in pairs]
    assert min(sizes) == 1 and sum(n > T for n in sizes) > 20
    with harness.quiet():
        expected = hflm.loglikelihood(requests("loglikelihood", *pairs), disable_tqdm=True)
    found = lm.loglikelihood(requests("loglikelihood", *pairs))
    np.testing.assert_allclose([x for x, _ in found], [x for x, _ in expected], rtol=0, atol=1e-4)
    assert [ok for _, ok in found] == [ok for _, ok in expected]
    assert 10 < sum(ok for _, ok in found) < 190


def test_a_continuation_needs_a_token_of_its_own(subject):
    token = next(t for t in subject.tokenizer.tokens if len(t) == 2 and t.isalpha()).decode()
    with pytest.raises(
        ValueError, match=f"continuation '{token[1]}' has no token of its own .* '{token[0]}'"
    ):
        adapter(subject).loglikelihood(requests("loglikelihood", (token[0], token[1])))


def test_continuation_longer_than_the_window_is_scored(subject):
    """HFLM refuses it."""
    tok, long = subject.tokenizer, text(random.Random(2), 70, 70)
    ids = tok.encode("Mia " + long)[len(tok.encode("Mia")) :]
    assert len(ids) > subject.model.config.block_size
    [(found, _)] = adapter(subject).loglikelihood(requests("loglikelihood", ("Mia", " " + long)))
    prefix = [tok.eot, *tok.encode("Mia")]
    assert found == pytest.approx(score.loglikelihood(subject.model, prefix, ids), abs=1e-4)


def rolling(lm, document: str) -> float:
    with harness.quiet():
        [found] = lm.loglikelihood_rolling(requests("loglikelihood_rolling", (document,)))
    return found


def test_rolling_likelihood_of_one_window_is_that_of_hflm(subject, hflm, monkeypatch):
    """Without its BOS token, which it would predict after itself."""
    document, eot = text(random.Random(3), 36, 36), subject.tokenizer.eot
    ids = subject.tokenizer.encode(document)
    assert 30 < len(ids) < 48
    found = rolling(adapter(subject), document)
    with_bos = rolling(hflm, document)
    monkeypatch.setattr(hflm, "add_bos_token", False)
    nats = found - rolling(hflm, document)
    assert score.bits_per_byte(abs(nats), len(document.encode())) < 1e-5
    extra = score.loglikelihood(subject.model, [eot], [eot, *ids]) - found
    assert with_bos == pytest.approx(found + extra, abs=1e-3) and abs(extra) > 1


def test_rolling_likelihood_of_two_windows_differs_from_hflm_in_the_last(subject, hflm, monkeypatch):
    """Ours begins where the first one ends; HFLM moves it back until it is full."""
    tok, model, T = subject.tokenizer, subject.model, subject.model.config.block_size
    document = text(random.Random(4), 60, 60)
    ids = [tok.eot, *tok.encode(document)]
    assert T < len(ids) - 1 < 2 * T
    logp = model(torch.tensor([ids[:T]]))[0][0].log_softmax(-1)
    first = sum(logp[i, ids[i + 1]].item() for i in range(T))

    def last(start: int) -> float:
        logp = model(torch.tensor([ids[start:-1]]))[0][0].log_softmax(-1)
        return sum(logp[i - start, ids[i + 1]].item() for i in range(T, len(ids) - 1))

    monkeypatch.setattr(hflm, "add_bos_token", False)
    ours, theirs = rolling(adapter(subject), document), rolling(hflm, document)
    assert ours == pytest.approx(first + last(T), abs=1e-3)
    assert theirs == pytest.approx(first + last(len(ids) - 1 - T), abs=1e-3)
    assert abs(ours - theirs) > 0.1


def test_greedy_generation_is_that_of_hflm(subject, hflm):
    rng = random.Random(5)
    settings = [{"max_gen_toks": 8, "until": [" "]}, {"max_gen_toks": 5, "do_sample": False}]
    settings += [{"max_gen_toks": 12, "until": ["a", "猫"], "temperature": 0.0}]
    pairs = [(text(rng, 1, 8), settings[i % 3]) for i in range(30)]
    with harness.quiet():
        expected = hflm.generate_until(requests("generate_until", *pairs), disable_tqdm=True)
    found = adapter(subject, rows=4).generate_until(requests("generate_until", *pairs))
    assert found == expected and any(found)


def test_sampling_follows_the_settings_of_the_task(subject):
    lm = adapter(subject)

    def write(n: int = 3, context: str = "the cat", **options) -> list[str]:
        return lm.generate_until(requests("generate_until", *[(context, options)] * n))

    greedy, *_ = write(max_gen_toks=9)
    assert write(max_gen_toks=9, do_sample=True, temperature=1.0, top_k=1) == [greedy] * 3
    assert write(max_gen_toks=9, do_sample=False, temperature=5.0) == [greedy] * 3
    drawn = write(max_gen_toks=9, do_sample=True, temperature=1.5)
    one_by_one = adapter(subject, rows=1).generate_until(
        requests("generate_until", *[("the cat", {"max_gen_toks": 9, "temperature": 1.5})] * 3)
    )
    assert len(set(drawn)) == len(set(one_by_one)) == 3 and drawn == write(
        max_gen_toks=9, do_sample=True, temperature=1.5
    )
    assert write(max_gen_toks=9, until=["", greedy[2:4]])[0] == greedy[: greedy.index(greedy[2:4])]
    assert write(max_gen_toks=2)[0] == greedy[:2]
    with pytest.raises(ValueError, match="no sampler num_beams"):
        write(num_beams=4)


def test_long_contexts_leave_room_for_the_generation(subject):
    """Without a warning: the last tokens are used, as many as fit beside max_gen_toks."""
    context, n = text(random.Random(6), 90, 90), 10
    prompt = subject.tokenizer.encode(context)[-(48 - 1 - n) :]
    [found] = adapter(subject).generate_until(requests("generate_until", (context, {"max_gen_toks": n})))
    ids = [subject.tokenizer.eot, *prompt]
    for _ in range(n):
        ids.append(subject.model(torch.tensor([ids]))[0][0, -1].argmax().item())
    new = ids[1 + len(prompt) :]
    new = new[: new.index(subject.tokenizer.eot)] if subject.tokenizer.eot in new else new
    assert found == subject.tokenizer.decode(new)


# ----------------------------------------------------------------------------------------------------------
# Tasks from local files


def read(name: str) -> list[dict]:
    return [json.loads(line) for line in (TASKS / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def arc(row: dict):
    context = f"Question: {row['question']}\nAnswer:"
    choices, gold = row["choices"]["text"], row["choices"]["label"].index(row["answerKey"])
    return [(context, " " + choice) for choice in choices], gold, choices


def hellaswag(row: dict):
    context = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
    return [(context, " " + ending) for ending in row["endings"]], int(row["label"]), row["endings"]


def mmlu(row: dict):
    lines = [f"{letter}. {choice}" for letter, choice in zip("ABCD", row["choices"], strict=True)]
    context = "The following are multiple choice questions (with answers) about little things.\n\n"
    context += "\n".join([row["question"], *lines, "Answer:"])
    return [(context, " " + letter) for letter in "ABCD"], row["answer"], "ABCD"


def winogrande(row: dict):
    before, after = row["sentence"].split("_")
    options = [row["option1"], row["option2"]]
    return [(before + option, " " + after.strip()) for option in options], "12".index(row["answer"]), options


def logprob(subject, context: str, continuation: str) -> float:
    tok = subject.tokenizer
    prefix, whole = tok.encode(context), tok.encode(context + continuation)
    ids = whole[len(prefix) :]
    prefix = [tok.eot, *prefix][-(subject.model.config.block_size + 1 - len(ids)) :]
    return score.loglikelihood(subject.model, prefix, ids)


@torch.no_grad()
def test_accuracies_of_local_tasks(subject, capfd):
    """All four, from one folder: against score.loglikelihood of contexts and choices written out here."""
    result = harness.run(subject, str(TASKS), rows=4)
    found = {figure.name: figure for figure in result.figures}
    expected = {}
    for convert in (arc, hellaswag, mmlu, winogrande):
        rows = [convert(row) for row in read(convert.__name__)]
        assert len(rows) == 20
        best, best_norm = [], []
        for pairs, _, choices in rows:
            logp = [logprob(subject, *pair) for pair in pairs]
            best.append(np.argmax(logp))
            best_norm.append(np.argmax([x / len(choice) for x, choice in zip(logp, choices, strict=True)]))
        golds = [gold for _, gold, _ in rows]
        expected[f"local_{convert.__name__} acc"] = np.equal(best, golds).sum()
        if convert in (arc, hellaswag):
            expected[f"local_{convert.__name__} acc_norm"] = np.equal(best_norm, golds).sum()
    assert found == {name: stats.proportion(name, n, 20) for name, n in expected.items()}
    assert len(result.items) == 80 and result.items[0].keys() == {
        "task",
        "doc_id",
        "filter",
        "acc",
        "acc_norm",
    }
    assert "examples before each item: 0" in result.notes[0]
    assert capfd.readouterr() == ("", "")


def test_gold_positions_of_the_made_up_items_are_spread():
    for convert in (arc, hellaswag, mmlu, winogrande):
        golds = [gold for _, gold, _ in map(convert, read(convert.__name__))]
        assert max(map(golds.count, golds)) <= 10 and set(golds) == set(
            range(2 + 2 * (convert != winogrande))
        )


@pytest.mark.parametrize(
    "local, theirs",
    [
        ("arc", "arc/arc_easy.yaml"),
        ("hellaswag", "hellaswag/hellaswag.yaml"),
        ("mmlu", "mmlu/default/_default_template_yaml"),
        ("winogrande", "winogrande/default.yaml"),
    ],
)
def test_local_tasks_ask_like_the_tasks_of_the_harness(local, theirs):
    from lm_eval import tasks
    from lm_eval.tasks._yaml_loader import load_yaml

    ours = load_yaml(TASKS / f"{local}.yaml")
    theirs = load_yaml(f"{tasks.__path__[0]}/{theirs}")
    for key in (
        "output_type",
        "doc_to_text",
        "doc_to_target",
        "doc_to_choice",
        "process_docs",
        "metric_list",
    ):
        pair = ours.get(key), theirs.get(key)
        functions = [getattr(value, "__code__", None) for value in pair]  # a file is loaded twice
        assert pair[0] == pair[1] or functions[0] == functions[1] is not None


def test_equal_scores_are_right_where_the_first_choice_is_gold(subject, monkeypatch):
    monkeypatch.setattr(score, "loglikelihoods", lambda model, pairs, **_: (np.zeros(len(pairs)),) * 2)
    result = harness.run(subject, [str(TASKS / "mmlu.yaml")])
    first = sum(row["answer"] == 0 for row in read("mmlu"))
    assert result.figures == [stats.proportion("local_mmlu acc", first, 20)] and 0 < first < 20
    assert "the harness takes the first" in " ".join(result.notes)


def test_limit_and_samples(subject):
    result = harness.run(subject, [str(TASKS / "arc.yaml")], limit=3, log_samples=True)
    assert [figure.n for figure in result.figures] == [3, 3] and len(result.items) == 3
    assert [item["doc"] for item in result.items] == read("arc")[:3]
    pairs = arc(read("arc")[0])[0]
    assert result.items[0]["arguments"] == [list(pair) for pair in pairs]
    responses = [float(response[0][0]) for response in result.items[0]["resps"]]
    assert responses == pytest.approx([logprob(subject, *pair) for pair in pairs], abs=1e-4)


def write_task(folder, rows: list[dict], **settings) -> str:
    settings = {"task": "mine", "dataset_path": "json", "test_split": "test"} | settings
    settings |= {"dataset_kwargs": {"data_files": {"test": "mine.jsonl"}}}
    (folder / "mine.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    (folder / "mine.yaml").write_text(json.dumps(settings), encoding="utf-8")  # JSON is YAML
    return str(folder / "mine.yaml")


def test_bits_per_byte_of_documents(subject, tmp_path):
    rng = random.Random(7)
    documents = [text(rng, 5, 40) for _ in range(6)]
    metrics = [{"metric": name} for name in ("bits_per_byte", "byte_perplexity", "word_perplexity")]
    keys = dict(output_type="loglikelihood_rolling", doc_to_text="", doc_to_target="{{text}}")
    path = write_task(tmp_path, [{"text": text} for text in documents], metric_list=metrics, **keys)
    word, byte, bits = harness.run(subject, [path]).figures
    eot, encode = subject.tokenizer.eot, subject.tokenizer.encode
    nats = [x.sum() for x in score.score(subject.model, [encode(text) for text in documents], eot)]
    sizes = [len(text.encode()) for text in documents]
    expected = stats.ratio("mine bits_per_byte", [x / math.log(2) for x in nats], sizes)
    assert bits.name == expected.name and bits.n == 6 and bits[1:4] == pytest.approx(expected[1:4])
    assert byte.value == pytest.approx(2**bits.value)
    words = sum(len(text.split()) for text in documents)
    assert word.value == pytest.approx(math.exp(sum(nats) / words), rel=1e-3) and word.low < word.value


def test_generation_tasks(subject, tmp_path):
    rows = [{"q": "the cat", "a": "x"}, {"q": "a dog", "a": "x"}]
    rows[1]["a"] = adapter(subject).generate_until(requests("", ("a dog", {"max_gen_toks": 4})))[0]
    keys = dict(output_type="generate_until", generation_kwargs={"max_gen_toks": 4, "until": ["zzz"]})
    path = write_task(tmp_path, rows, doc_to_text="{{q}}", doc_to_target="{{a}}", **keys)
    [figure] = harness.run(subject, [path]).figures
    assert figure == stats.proportion("mine exact_match", 1, 2)


def test_intervals_come_from_the_standard_error_of_the_harness():
    """Except for shares of items; a group has no samples of its own."""
    samples = [{"filter": "none", "f1": (0, 1), "acc": i % 2} for i in range(4)]
    task = {"alias": "t", "sample_len": 4, "f1,none": 0.5, "f1_stderr,none": 0.1, "acc,none": 0.5}
    group = {"alias": "g", "sample_len": 9, "acc,none": 0.25, "acc_stderr,none": "N/A"}
    task |= {"acc_stderr,none": 0.3, "acc,strict": 1.0, "acc_stderr,strict": 0.0}
    samples.append({"filter": "strict", "acc": 1})
    f1, acc, strict, whole = harness.figures({"results": {"t": task, "g": group}, "samples": {"t": samples}})
    assert strict == stats.proportion("t acc (strict)", 1, 1)
    assert f1[:5] == ("t f1", 0.5, 0.5 - stats.Z * 0.1, 0.5 + stats.Z * 0.1, 4)
    assert acc == stats.proportion("t acc", 2, 4)
    assert (
        whole[:2] == ("g acc", 0.25)
        and whole.percent
        and not f1.percent
        and math.isnan(whole.low)
        and whole.n == 9
    )


# ----------------------------------------------------------------------------------------------------------
# Errors


@pytest.fixture
def only_arc(monkeypatch):
    """An index of the harness' ARC tasks alone: that of all its tasks takes 10 seconds."""
    from lm_eval import tasks

    only = tasks.TaskManager(include_path=f"{tasks.__path__[0]}/arc", include_defaults=False)
    monkeypatch.setattr(harness, "manager", lambda include_path: only)


def test_unknown_tasks_and_files(subject, only_arc, tmp_path):
    with pytest.raises(ValueError, match="^lm_eval has no task 'arc_eazy'; did you mean 'arc_easy'[?]$"):
        harness.run(subject, ["arc_eazy"])
    with pytest.raises(FileNotFoundError, match="^there is no file .*nothing.yaml$"):
        harness.run(subject, [str(tmp_path / "nothing.yaml")])
    with pytest.raises(ValueError, match="no task in this folder"):
        harness.run(subject, [str(tmp_path)])
    path = write_task(tmp_path, [{"text": "a"}], output_type="multiple_choice", doc_to_text="{{no.such}}")
    with pytest.raises(ValueError, match="mine.yaml: UndefinedError"):
        harness.run(subject, [path])
    (tmp_path / "mine.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match="mine.jsonl"):
        harness.run(subject, [path])
    (tmp_path / "mine.yaml").write_text("task: [", encoding="utf-8")
    with pytest.raises(ValueError, match="mine.yaml: ParserError"):
        harness.run(subject, [path])
    with pytest.raises(ValueError, match="repeats the task local_arc"):
        harness.run(subject, [str(TASKS / "arc.yaml"), str(TASKS)])


def test_data_that_are_not_cached_need_the_hub(subject, only_arc, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match="HF_HUB_OFFLINE is set, and the data of lm_eval:arc_easy are not"):
        harness.run(subject, ["arc_easy"])


def test_without_a_network_it_ends_at_once(only_arc, monkeypatch):
    """Nothing listens at this address; huggingface_hub alone would try for 23 seconds."""
    import datasets
    from huggingface_hub import constants

    def sleep(seconds):
        raise AssertionError("it waits for another attempt")

    monkeypatch.setattr(time, "sleep", sleep)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(OSError, match="^cannot load lm_eval:arc_easy: .* cannot be reached at http://127"):
        harness.load(["arc_easy"])
    assert (constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE) == (False, False)


def test_without_lm_eval_the_error_says_what_to_install(monkeypatch):
    """The module itself does not need it."""
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    run = runpy.run_path(harness.__file__)["run"]
    with pytest.raises(ValueError, match="^lm_eval is not installed: pip install -r requirements-eval.txt$"):
        run(None, ["arc_easy"])
