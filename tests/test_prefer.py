"""experiments/prefer.py and self_play.py: losses, batches, resuming; pairs that a model writes."""

import copy
import json
import math
import random
import signal
from itertools import islice
from pathlib import Path

import pytest
import torch
from helpers import MICRO, bit_equal, metrics, random_data, run_state

import experiments
import prepare
import train
from experiments import self_play
from experiments.prefer import encode
from nanostlm import checkpoint, generate, report, settings, tokenizer, toystories

BYTE = tokenizer.get("byte")
PAIRS = [
    {"prompt": "Tom", "chosen": " ran to Mia.", "rejected": " sat.", "wrong": 2},
    {"prompt": "", "chosen": "é!", "rejected": "犬 ate", "wrong": 5},
    {"prompt": "A dog had a", "chosen": "", "rejected": " 犬!", "wrong": 1},
    {"prompt": "Mia", "chosen": " ran.", "rejected": " ran and ran", "wrong": 0},
    {"prompt": "Ben sat", "chosen": " on a log.", "rejected": " up", "wrong": 3},
]
WRONG_BYTE = [2, 7, 1, 0, 3]  # of each rejected text; the number of its bytes stands for end-of-text


def write_pairs(pairs=PAIRS, name: str = "prefer.jsonl") -> str:
    Path(name).write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")
    return name


def objective(pairs=PAIRS, dtype=torch.float64, **changes):
    """The objective of a micro model with random weights."""
    Config, Model = experiments.architecture(changes.get("architecture", "gpt"))
    parts = dict(model=Config, objective_config=experiments.objective("prefer")[0])
    cls = settings.with_parts(train.TrainConfig, **parts)
    own = dict(vocab_size=257, objective="prefer", init_from="first", pairs=write_pairs(pairs), block_size=32)
    values = MICRO | own | changes
    c = settings.build(cls, {key: x for key, x in values.items() if key in settings.settings_of(cls)})
    c.validate()
    torch.manual_seed(0)
    model = Model(c.model).to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.3)
    return experiments.objective("prefer")[1](c, model, random_data())


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


# ----------------------------------------------------------------------------------------------------------
# The loss


def logprobs(model, prompt: str, text: str) -> list[torch.Tensor]:
    """The log-probability of each byte of the text and of end-of-text, one forward pass for each."""
    ids, found = [256, *prompt.encode()], []
    for new in [*text.encode(), 256]:
        x = model(torch.tensor([ids]))[0][0, -1]
        found.append(x[new] - x.max() - (x - x.max()).exp().sum().log())
        ids.append(new)
    return found


@pytest.mark.parametrize("pointer", [False, True])
@pytest.mark.parametrize("preference", ["dpo", "unlikelihood"])
def test_loss_and_gradient_are_those_of_the_formula(preference, pointer):
    goal = objective(preference=preference, pointer=pointer, beta=0.7, likelihood=0.3, batch_size=3)
    model, ref = goal.model, copy.deepcopy(goal.model)
    [(idx, targets)] = goal.batch(2)
    goal(model, idx, targets, 0)  # the model is the reference
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
    total, parts = goal(model, idx, targets, 2)
    found = torch.autograd.grad(total, list(model.parameters()))
    terms, margins, chosen = [], [], []
    for i in targets.pairs.tolist():
        prompt, y, other = (PAIRS[i][key] for key in ("prompt", "chosen", "rejected"))
        logp = logprobs(model, prompt, y)
        chosen += logp
        if preference == "dpo":
            gain = [sum(logprobs(model, prompt, x)) - sum(logprobs(ref, prompt, x)) for x in (y, other)]
            margins.append(gain[0] - gain[1])
            terms.append((1 + (-0.7 * margins[-1]).exp()).log())
        else:
            terms.append(-(1 - logprobs(model, prompt, other)[WRONG_BYTE[i]].exp()).log())
    loss, term = -sum(chosen) / len(chosen), sum(terms) / 3
    expected = torch.autograd.grad(term + 0.3 * loss, list(model.parameters()))
    assert total.item() == pytest.approx((term + 0.3 * loss).item(), abs=1e-10)
    assert parts["loss"].item() == pytest.approx(loss.item(), abs=1e-10)
    assert parts["preference"].item() == pytest.approx(term.item(), abs=1e-10)
    assert all(torch.allclose(a, b, rtol=0, atol=1e-9) for a, b in zip(found, expected, strict=True))
    if preference == "dpo":
        assert parts["margin"].item() == pytest.approx(sum(margins).item() / 3, abs=1e-9)
        assert parts["accuracy"].item() == pytest.approx(sum(margin > 0 for margin in margins).item() / 3)
    else:
        assert parts.keys() == {"loss", "preference"}


@pytest.mark.parametrize("likelihood", [0.0, 1.0])
@pytest.mark.parametrize("preference", ["dpo", "unlikelihood"])
def test_a_small_step_down_the_gradient_moves_the_pairs_apart(preference, likelihood):
    goal = objective(preference=preference, likelihood=likelihood, batch_size=5)
    [(idx, targets)] = goal.batch(0)
    total, before = goal(goal.model, idx, targets, 0)
    total.backward()
    with torch.no_grad():
        for p in goal.model.parameters():
            p.sub_(p.grad, alpha=1e-3)
    after = goal(goal.model, idx, targets, 1)[1]
    assert after["preference"] < before["preference"]
    assert not likelihood or after["loss"] < before["loss"]
    if preference == "dpo":
        assert before["margin"].abs() < 1e-10 and before["preference"].item() == pytest.approx(math.log(2))
        assert after["margin"] > 1e-4


@pytest.mark.parametrize("architecture", ["gpt", "bigram"])
def test_loss_of_any_architecture_is_finite_when_the_wrong_token_is_certain(architecture):
    goal = objective([PAIRS[0]], torch.float32, architecture=architecture, preference="unlikelihood")
    [(idx, targets)] = goal.batch(0)
    with torch.no_grad():
        for p in goal.model.parameters():
            p.zero_()
    place = targets[-1].argmax()  # the only target
    total, parts = goal(goal.model, idx, targets, 0)
    assert parts["preference"].item() == pytest.approx(-math.log(1 - 1 / 257), rel=1e-4)
    if architecture == "bigram":
        with torch.no_grad():
            goal.model.table.weight[idx[-1, place], targets[-1, place]] = 200
        total, parts = goal(goal.model, idx, targets, 0)
        assert parts["preference"].item() == pytest.approx(-math.log(1e-6), rel=1e-2)
    total.backward()
    assert all(p.grad.isfinite().all() for p in goal.model.parameters())


@pytest.mark.parametrize("preference", ["dpo", "unlikelihood"])
def test_padding_changes_nothing_and_prompts_have_no_targets(preference):
    goal = objective(preference=preference, batch_size=5)
    [(idx, targets)] = goal.batch(0)
    goal(goal.model, idx, targets, 0)
    with torch.no_grad():
        goal.model.head.linear.weight.mul_(1.1)  # no longer the reference
    first = goal(goal.model, idx, targets, 0)
    changed = torch.nn.functional.pad(idx, (0, 3), value=65)
    wider = torch.nn.functional.pad(targets, (0, 3), value=-1)
    wider.pairs = targets.pairs
    for row, i in enumerate([*targets.pairs.tolist()] * 2):
        key = "chosen" if row < 5 else "rejected"
        pair = PAIRS[i]
        prompt, text = [256, *pair["prompt"].encode()], [*pair[key].encode(), 256]
        scored = range(len(text))
        if preference == "unlikelihood" and key == "rejected":
            text = text[: WRONG_BYTE[i] + 1]
            scored = [WRONG_BYTE[i]]
        length = len(prompt) + len(text) - 1
        assert idx[row, :length].tolist() == [*prompt, *text][:-1]
        expected = [text[k] if k in scored else -1 for k in range(len(text))]
        assert targets[row].tolist() == [-1] * (len(prompt) - 1) + expected + [-1] * (idx.shape[1] - length)
        changed[row, length:] = torch.randint(0, 256, (changed.shape[1] - length,))
    again = goal(goal.model, changed, wider, 0)
    assert first[0].item() == pytest.approx(again[0].item(), abs=1e-12)
    assert all(first[1][key].item() == pytest.approx(x.item(), abs=1e-12) for key, x in again[1].items())


def test_first_wrong_token_holds_the_wrong_character():
    tok = tokenizer.train_bpe(["Tom sat on the 犬 mat. The 犬 sat on Tom."] * 30, 290)
    text = " on the 犬 mat. Tom 🐶"
    ids = tok.encode(text)
    assert len(ids) < len(text.encode()) - 8, "tokens of several bytes"
    for wrong in range(len(text) + 1):
        idx, targets = encode(tok, "Tom sat", text, wrong).tolist()
        [at] = [i for i, target in enumerate(targets) if target >= 0]
        assert at == len(targets) - 1 == len(idx) - 1 and idx[0] == tok.eot
        [*before, token] = [*idx[1 + len(tok.encode("Tom sat")) :], targets[at]]
        assert [*before, token] == [*ids, tok.eot][: len(before) + 1]
        start = len(tok.decode_bytes(before))
        assert start <= len(text[:wrong].encode())
        if token != tok.eot:
            assert len(text[:wrong].encode()) < start + len(tok.decode_bytes([token]))
        else:
            assert wrong == len(text)


def test_reference_does_not_block_the_gradients_of_an_autocast_forward_pass():
    goal = objective(dtype=torch.float32)
    goal.model.train()
    [(idx, targets)] = goal.batch(0)
    with torch.autocast("cpu", torch.bfloat16):
        goal(goal.model, idx, targets, 0)[0].backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in goal.model.parameters())
    assert goal.model.training


# ----------------------------------------------------------------------------------------------------------
# Pairs and batches


def test_batch_depends_on_seed_and_step_and_an_epoch_has_each_pair_once():
    goal, other = (objective(batch_size=2, seed=seed) for seed in (1, 2))
    drawn = [[targets.pairs.tolist() for _, targets in goal.batch(step)] for step in range(10)]
    assert drawn[3] == [targets.pairs.tolist() for _, targets in goal.batch(3)]
    seen = [i for [pairs] in drawn for i in pairs]
    assert all(sorted(seen[i : i + 5]) == [0, 1, 2, 3, 4] for i in range(0, 20, 5))
    assert seen[:5] != seen[5:10] or seen[:5] != seen[10:15]
    assert drawn != [[targets.pairs.tolist() for _, targets in other.batch(step)] for step in range(10)]


@pytest.mark.parametrize("accumulation", [1, 2])
def test_ranks_partition_the_batch(accumulation, monkeypatch):
    shape = dict(batch_size=2, gradient_accumulation_steps=accumulation)

    def rows(goal) -> list[tuple]:
        found = []
        for idx, targets in goal.batch(1):
            n = len(targets.pairs)
            assert idx.shape == targets.shape == (2 * n, idx.shape[1])
            strip = [tuple(row[row >= 0].tolist()) for row in targets]
            found += zip(targets.pairs.tolist(), strip[:n], strip[n:], strict=True)
        return found

    whole = rows(objective(**shape))
    monkeypatch.setenv("WORLD_SIZE", "2")
    parts = []
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        parts.append(rows(objective(**shape)))
    assert len(parts[0]) == len(parts[1]) == accumulation and sorted(parts[0] + parts[1]) == sorted(whole)


def test_pairs_that_do_not_fit_are_dropped_with_a_note(capsys):
    """The longest row, with end-of-text before it, is that of "Ben sat on a log."."""
    objective(block_size=1 + len("Ben sat on a log."))
    assert "5 of 5 pairs are used; 0 are longer than block_size=18" in capsys.readouterr().err
    goal = objective(block_size=17, batch_size=4)
    assert "4 of 5 pairs are used; 1 are longer than block_size=17" in capsys.readouterr().err
    [(idx, targets)] = goal.batch(0)
    assert idx.shape == (8, 17) and sorted(targets.pairs.tolist()) == [0, 1, 2, 3]
    objective([PAIRS[0], PAIRS[1] | {"wrong": None}, *PAIRS[2:]], preference="unlikelihood", block_size=17)
    assert "3 of 5 pairs are used; 1 have no wrong character, 1 are longer" in capsys.readouterr().err


LINE = json.dumps(PAIRS[0]) + "\n"


@pytest.mark.parametrize(
    "text, changes, message",
    [
        (LINE + "{'a'}\n", (), "prefer.jsonl, line 2: Expecting"),
        (LINE + "\n[1]", (), "prefer.jsonl, line 3: the content must be an object, not [1]"),
        ('{"prompt": "a", "chosen": "b"}', (), "prefer.jsonl, line 1: rejected is missing"),
        ('{"prompt": "a", "chosen": "b", "rejected": 3}', (), "line 1: rejected must be text, not 3"),
        (
            LINE.replace('"wrong": 2', '"wrong": 6'),
            (),
            "line 1: wrong=6 is past the end of the rejected text",
        ),
        (LINE.replace('"wrong": 2', '"wrong": -1'), (), "line 1: wrong must be a whole number from 0"),
        (LINE + LINE.replace("Tom", "\udcff"), (), "prefer.jsonl, line 2: 'utf-8' codec can't decode"),
        ("", (), "prefer.jsonl: 0 of 0 pairs are used"),
        (LINE, ("block_size", 4), "0 of 1 pairs are used; 1 are longer than block_size=4"),
        (LINE, ("pairs", "none.jsonl"), "there is no file none.jsonl: experiments/self_play.py makes one"),
        (LINE, ("pairs", ""), "pairs must be a file, and '' is empty"),
        (LINE, ("pairs", "."), "pairs must be a file, and '.' is a folder"),
        (LINE, ("init_from", ""), "objective=prefer starts from a trained model: add --init_from=RUN"),
        (LINE, ("context_schedule", "0:0.5, 0.5:1"), "leave out context_schedule: objective=prefer"),
        (LINE, ("beta", 0), "beta must be between 1e-06 and 1,000"),
        (LINE, ("likelihood", -1), "likelihood must be between 0 and"),
        (LINE, ("preference", "spin"), "preference must be one of dpo, unlikelihood; not 'spin'"),
        (LINE, ("compile", "True"), "leave out compile: objective=prefer is not made for it"),
    ],
    ids=range(18),
)
def test_user_error_is_one_line_that_names_it(text, changes, message, main):
    Path("prefer.jsonl").write_text(text, errors="surrogateescape")
    assert main("first", max_iters=1) == 0
    own = dict(objective="prefer", pairs="prefer.jsonl", init_from="first", max_iters=1)
    assert main("run", **own | dict([changes] if changes else [])) == 2
    assert message in main.stderr.splitlines()[-1] and "Traceback" not in main.stderr


# ----------------------------------------------------------------------------------------------------------
# Training


@pytest.mark.parametrize("preference", ["dpo", "unlikelihood"])
def test_run_starts_at_the_reference_and_resumes_bitwise(preference, main):
    """Without the model of init_from, which the reference must not be recomputed from."""
    assert main("first", block_size=32) == 0
    own = dict(objective="prefer", pairs=write_pairs(), preference=preference, init_from="first/latest.pt")
    own |= dict(block_size=32, max_iters=8, log_interval=1, gradient_accumulation_steps=2)
    assert main("whole", **own) == 0
    assert main("half", stop_after=4, **own) == 143
    Path("first").rename("moved")
    assert main("half", "--resume", micro=False) == 0, main.stderr
    assert metrics("half") == metrics("whole") and bit_equal(run_state("half"), run_state("whole"))
    lines = metrics("whole", "train")
    common = {"step", "split", "loss", "lr", "grad_norm", "tokens", "preference"}
    if preference == "dpo":
        assert all(line.keys() == common | {"margin", "accuracy"} for line in lines)
        assert lines[0]["margin"] == pytest.approx(0, abs=1e-4) and lines[-1]["margin"] > 0.1
        assert lines[0]["preference"] == pytest.approx(math.log(2), abs=1e-5)
        saved = checkpoint.read("half/latest.pt")["objective"]["reference"]
        model, _ = checkpoint.load("moved/latest.pt")
        for pair, nats in zip(PAIRS, saved.tolist(), strict=True):
            with torch.no_grad():
                sums = [-sum(logprobs(model, pair["prompt"], pair[key])) for key in ("chosen", "rejected")]
            assert nats == pytest.approx([x.item() for x in sums], rel=1e-5)
    else:
        assert all(line.keys() == common for line in lines)
    write_pairs(PAIRS[1:])
    assert main("half", "--resume", micro=False, max_iters=12) == 2
    assert "prefer.jsonl has changed since the run began" in main.stderr


def test_run_that_ends_before_its_first_update_resumes(main, monkeypatch):
    assert main("first", block_size=32) == 0
    own = dict(objective="prefer", pairs=write_pairs(), init_from="first", block_size=32, max_iters=4)
    assert main("whole", **own) == 0
    validate = train.Trainer.val_step

    def stop(self):
        self.stop = signal.SIGTERM
        return validate(self)

    with monkeypatch.context() as patch:
        patch.setattr(train.Trainer, "val_step", stop)
        assert main("half", **own) == 143
    state = checkpoint.read("half/latest.pt")
    assert state["step"] == 0 and "reference" not in state["objective"]
    assert main("half", "--resume", micro=False) == 0, main.stderr
    assert bit_equal(run_state("half"), run_state("whole"))


# ----------------------------------------------------------------------------------------------------------
# Self-play


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Path:
    """A folder with `data`, stories of two to four short sentences, and `first`, a model that writes some."""
    folder, rng = tmp_path_factory.mktemp("self-play"), random.Random(0)
    sentences = [
        f"{name} {verb}." for name in ("Tom", "Mia", "Ben") for verb in ("ran", "sat", "hid", "fell")
    ]
    texts = {" ".join(rng.choices(sentences, k=rng.randint(2, 4))) for _ in range(300)}
    (folder / "short.txt").write_text("\n\n".join(sorted(texts)))
    prepare.prepare("short", "byte", source=str(folder / "short.txt"), data_dir=folder / "data")
    changes = dict(dataset="short", data_dir=folder / "data", out_dir=folder / "first", block_size=48)
    changes |= dict(max_iters=150, batch_size=8, save_interval=150, eval_interval=150)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "final", lambda *args: None)
        assert train.main([f"--{key}={value}" for key, value in (MICRO | changes).items()]) == 0
    return folder


def self_play_run(start, out_dir, *words: str) -> int:
    """self_play.main with small settings."""
    small = ["batch_size=4", "save_interval=1", "dtype=float32", "threads=1"]
    argv = [f"--out_dir={out_dir}", f"--init_from={start / 'first'}", "--rounds=2", "--pairs=12"]
    argv += sorted([*small, *words], key=lambda word: word[0] != "-")  # the settings are together
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(self_play, "ROWS", 8)
        return self_play.main(argv)


@pytest.fixture(scope="module")
def whole(start) -> Path:
    """The folder of a run of two rounds."""
    assert self_play_run(start, start / "whole") == 0
    return start / "whole"


@pytest.fixture
def play(start, capsys):
    """play(out_dir, ...) runs self_play.main with small settings; play.out and play.err: what it printed."""

    def run(out_dir, *words: str) -> int:
        status = self_play_run(start, out_dir, *words)
        run.out, run.err = capsys.readouterr()
        return status

    return run


def pairs_of(folder) -> list[dict]:
    return [json.loads(line) for line in Path(folder, "prefer.jsonl").read_text().splitlines()]


def test_rounds_learn_from_pairs_of_the_model_before(whole, start):
    real = (start / "short.txt").read_text().split("\n\n")
    for number, before in ((1, start / "first" / "best.pt"), (2, whole / "round-1" / "latest.pt")):
        folder = whole / f"round-{number}"
        pairs, result = pairs_of(folder), json.loads((folder / "result.json").read_text())
        assert len(pairs) == 12 == len({(pair["prompt"], pair["rejected"]) for pair in pairs})
        for pair in pairs:
            assert pair["prompt"] + pair["chosen"] in real and pair["rejected"] != pair["chosen"]
            assert len(pair["prompt"] + pair["rejected"]) < 48
            assert pair["prompt"].endswith(".") and pair["chosen"].startswith(" ")
        batches = (folder / "generated.jsonl").read_text().count("\n")
        assert result["texts"] == 8 * batches, "pairs and dropped texts"
        state = checkpoint.read(folder / "latest.pt")
        assert state["step"] == 3 and state["train_config"]["init_from"] == str(before)
        assert metrics(folder, "train")[0]["margin"] == pytest.approx(0, abs=1e-4)
        assert metrics(folder, "val")[-1]["bpb"] == pytest.approx(result["bpb"], abs=1e-4)
    prompts = [{pair["prompt"] + pair["chosen"] for pair in pairs_of(whole / f"round-{n}")} for n in (1, 2)]
    assert len(prompts[0] & prompts[1]) < 2, "other stories in each round"


def test_repeated_command_only_prints_the_table(whole, play, monkeypatch):
    monkeypatch.setattr(train, "run", None)
    for name in ("make_pairs", "measure"):
        monkeypatch.setattr(self_play, name, None)
    results = [json.loads((whole / f"round-{n}" / "result.json").read_text()) for n in range(3)]
    assert play(whole) == 0
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in play.out.splitlines()]
    assert [row[:3] for row in table[2:]] == [[str(n), f"{x['bpb']:.4f}", "-"] for n, x in enumerate(results)]
    assert play(whole, "--seed=1") == 2
    assert "whole has rounds with seed=0: choose another --out_dir" in play.err


def test_pairs_come_from_the_distribution_of_the_model(start):
    """The rejected texts of a batch are what `generate` writes after the same prompts at temperature 1."""
    model, tok = checkpoint.load(start / "first")
    begun = [("Tom ran.", " Mia sat."), ("Mia hid. Ben ran.", " Tom fell."), ("Ben fell.", " Ben sat.")] * 40
    samplers = generate.chain(temperature=1, top_p=1)
    written = generate.generate(model, [tok.encode(x) for x, _ in begun], 48, samplers, eot=256, seed=7)
    shortest = min(range(120), key=lambda i: len(written[i]))
    begun[shortest] = begun[shortest][0], tok.decode(written[shortest])
    found = self_play.continue_batch(model, tok, begun, 7, "spin", None)
    assert found["dropped"]["equal to the real one"] > 0
    texts = [
        (prompt, tok.decode(ids))
        for (prompt, chosen), ids in zip(begun, written, strict=True)
        if len(prompt) + len(ids) < 48 and tok.encode(tok.decode(ids)) == ids and tok.decode(ids) != chosen
    ]
    assert [(pair["prompt"], pair["rejected"]) for pair in found["pairs"]] == texts and len(texts) > 60
    assert len(texts) + sum(found["dropped"].values()) == 120 and found["dropped"]["unfinished"] > 0


@pytest.mark.parametrize("where", ["writing", "training", "between rounds"])
def test_killed_self_play_continues(where, whole, play, monkeypatch):
    calls = []

    def interrupted(original):
        def call(self, *args):
            calls.append(args)
            if len(calls) == 3 and where == "training":
                self.requests.stop = signal.SIGTERM
            elif len(calls) == 2 and where != "training":
                raise KeyboardInterrupt
            return original(self, *args)

        return call

    name = {"writing": "continue_batch", "between rounds": "measure"}.get(where)
    with monkeypatch.context() as patch:
        holder, name = (self_play, name) if name else (train.Trainer, "train_step")
        patch.setattr(holder, name, interrupted(getattr(holder, name)))
        assert play("run") == (143 if where == "training" else 130)
    log = Path("run/round-1/generated.jsonl")
    done = log.read_bytes()
    if where == "writing":
        assert done.count(b"\n") == 1
        log.write_bytes(done + b'{"seconds": 1.2, "dro')
    assert play("run") == 0
    assert log.read_bytes().startswith(done) and all(map(json.loads, log.read_text().splitlines()))
    for number in (1, 2):
        a, b = (Path(run, f"round-{number}") for run in ("run", whole))
        assert pairs_of(a) == pairs_of(b) and metrics(a) == metrics(b)
        assert bit_equal(checkpoint.read(a / "latest.pt")["model"], checkpoint.read(b / "latest.pt")["model"])


def test_plain_arm_trains_on_as_many_tokens_of_stories(play, start):
    assert play("run", "--arm=plain", "--pairs=40", "--rounds=1") == 0
    meta = json.loads((start / "data/short/byte/meta.json").read_text())["train"]
    tokens = 2 * 40 * meta["tokens"] / meta["stories"]
    last = metrics("run/round-1", "train")[-1]
    assert last["tokens"] == pytest.approx(tokens, abs=2 * 48) and "preference" not in last
    assert not Path("run/round-1/prefer.jsonl").exists()


def toy(n: int) -> list[str]:
    return [text for text, _ in islice(toystories.stories(seed=3), n)]


def test_wrong_character_of_a_toystory_is_the_first_that_no_story_has():
    assert "§" not in toystories.TEXT
    rng = random.Random(0)
    for text in toy(8):
        assert toystories.check(text).at is None and toystories.check(text).ok
        for _ in range(6):
            i = rng.randrange(len(text))
            assert toystories.check(text[:i] + "§" + text[i:]).at == i
            assert toystories.check(text[:i].rstrip()).at == len(text[:i].rstrip()), "end-of-text is wrong"
            before = "\n " + text[:i].replace(" ", "  ")
            assert toystories.check(before + "§ and " + text[i:]).at == len(before)
        assert toystories.check(text.replace("\n", " ")).at is None
        assert toystories.check(text + " And then.").at == len(text)


def test_wrong_name_is_found_in_its_token():
    text = next(text for text in toy(50) if text.count("Tom") > 2)
    last = text.rindex("Tom")
    assert toystories.check(text[:last] + "Tqm" + text[last + 3 :]).at == last + 1


@pytest.mark.parametrize("arm", ["invalid", "unlikelihood"])
def test_arms_with_a_checker_reject_invalid_texts_only(arm, monkeypatch):
    stories = toy(4)
    begun = [(text[:i], text[i:]) for text in stories if (i := text.index(".") + 1)]
    i, broken = len(begun[1][1]) // 2, begun[1][1]
    flat = begun[3][1].replace("\n", " ")
    texts = [begun[0][1], broken[:i] + "§" + broken[i:], begun[2][1] + "\ufffd", flat]
    monkeypatch.setattr(generate, "generate", lambda *args, **kwargs: [[*x.encode()] for x in texts])
    model = objective(block_size=2000).model
    begun[0] = begun[0][0], "another real one"
    found = self_play.continue_batch(model, BYTE, begun, 0, arm, toystories.check)
    wrong = {pair["rejected"]: pair["wrong"] for pair in found["pairs"]}
    expected = {texts[1]: i, texts[2]: len(begun[2][1])} | ({flat: None} if arm == "invalid" else {})
    assert wrong == expected and found["dropped"]["valid"] == 1
    assert found["dropped"].get("without a wrong character", 0) == (arm == "unlikelihood")


def test_repeated_texts_are_pairs_once_and_too_few_are_an_error(play, monkeypatch):
    def same(model, tok, begun, *args):
        pair = {"prompt": "Tom ran.", "chosen": " Mia sat.", "rejected": " Mia ran.", "wrong": None}
        return {"seconds": 0, "dropped": {"unfinished": 1}, "pairs": [pair] * (len(begun) - 1)}

    monkeypatch.setattr(self_play, "continue_batch", same)
    assert play("run", "--pairs=2", "--rounds=1") == 2
    assert "1 pairs from 40 texts in 0 s; dropped: 5 unfinished, 34 repeated; lower --pairs=2" in play.err


@pytest.mark.parametrize(
    "words, message",
    [
        (["--rounds=-1"], "--rounds must be between 0 and"),
        (["--pairs=0"], "--pairs must be between 1 and"),
        (["--arm=dpo"], "argument --arm: invalid choice: 'dpo'"),
        (["--arm=invalid"], "--arm invalid needs a corpus with a checker: toystories"),
        (["beta"], "a setting of train.py is written KEY=VALUE, not 'beta'"),
        (["bta=1"], "there is no option '--bta'; did you mean '--beta'?"),
        (["beta=-1"], "beta must be between"),
        (["batch_size=x"], "batch_size must be a whole number, not 'x'"),
        (["--arm=plain", "beta=1"], "there is no option '--beta'"),
        (["--init_from=nowhere.pt"], "there is no checkpoint at nowhere.pt"),
        (["--data_dir=nowhere"], "dataset 'short' not found"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_mistake_is_reported_before_any_work(words, message, play):
    assert play("run", *words) == 2
    assert message in play.err.splitlines()[-1] and not Path("run").exists()
