"""
Files that hold something else than they should: every one is refused in one line, which names file and key.

Each test takes one kind of file, and puts junk of every type in the place of every value in it.
"""

import copy
import json
import math
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import Program, cli_args, metrics, trainer

import evaluate
import sample
import train
from nanostlm import checkpoint, runs, schema, tokenizer
from nanostlm import data as datasets
from nanostlm.formats import hf

DEEP = json.loads("[" * 100 + "]" * 100)
JUNK = [None, True, -1, 0, 1, 0.5, 2**63, 10**400, math.nan, math.inf, "", "x", "../x", "a\0b", "\ud800"]
JUNK += [[], [1], [[]], {}, {"a": 1}, DEEP]
TEXTS = ["", "{", "[]", "[1]", "3", "null", '"x"', "NaN", "1e400", "9" * 5000, "[" * 100_000, '{"a": 1}x']
BYTES = [text.encode() for text in TEXTS] + [b"\xff\xfe{}", b"\0\0\0", b"{\xc3}"]


def places(data, at: tuple = ()):
    """Where the values in nested dicts are: tuples of keys."""
    for key, value in data.items():
        yield (*at, key)
        if isinstance(value, dict):
            yield from places(value, (*at, key))


def changed(data: dict, place: tuple, value, remove: bool = False) -> dict:
    """A copy of nested dicts with another value at a place, or without it."""
    data = copy.deepcopy(data)
    inner = data
    for key in place[:-1]:
        inner = inner[key]
    if remove:
        del inner[place[-1]]
    else:
        inner[place[-1]] = value
    return data


def refused(call, *files: str) -> str:
    """call() works, or fails for a user's error with a line that names one of the files. -> that line."""
    try:
        call()
    except (ValueError, FileNotFoundError) as error:
        message = str(error)
        assert "\n" not in message.strip() and any(file in message for file in files), message
        return message
    return ""


def said(capsys, status: int) -> str:
    """The one line on stderr of a script that ended with a status of 1 or 2."""
    found = [line for line in capsys.readouterr().err.splitlines() if "rror" in line]
    assert status in (1, 2) and len(found) == 1 and found[0].startswith("error: "), found
    return found[0]


# ----------------------------------------------------------------------------------------------------------
# The function


@pytest.mark.parametrize(
    "value,wanted,message",
    [
        ({"a": 1}, {"a": schema.COUNT}, None),
        ({"a": 0}, {"a": schema.COUNT}, "a must be a whole number from 1 on, not 0"),
        ({"a": True}, {"a": schema.COUNT}, "a must be a whole number from 1 on, not True"),
        ({"a": 1.0}, {"a": schema.COUNT}, "a must be a whole number from 1 on, not 1.0"),
        ({"a": 2**63}, {"a": schema.COUNT}, "a must be a whole number"),
        ({}, {"a": schema.COUNT}, "a is missing"),
        ({"a": None}, {"a": schema.COUNT}, "a is missing"),
        ({"a": None}, {"a?": schema.COUNT}, None),
        ({}, {"a?": schema.COUNT}, None),
        ({"a": "x"}, {"a?": schema.COUNT}, "a must be a whole number"),
        ({"b": 1}, {"a?": schema.COUNT}, None),
        ({"b": 1}, {"a?": schema.COUNT, "*": schema.NONE}, "b must be absent, not 1"),
        ({"a": {"b": 1}}, {"a": {"b": schema.TEXT}}, "a.b must be text, not 1"),
        ({"a": [1]}, {"a": {"b": schema.TEXT}}, r"a must be an object, not \[1\]"),
        ({"a": {}}, {"a": {"b": schema.TEXT}}, "a.b is missing"),
        ({"a": {5: 1, "x": -1}}, {"a": {"*": schema.WHOLE}}, "a.x must be"),
        ({"a": [1, "x"]}, {"a": [schema.WHOLE]}, "a.1 must be a whole number from 0 on, not 'x'"),
        ({"a": "xy"}, {"a": [schema.WHOLE]}, "a must be a list, not 'xy'"),
        ({"a": [1, {}]}, {"a": []}, None),
        ([], {"a": schema.WHOLE}, r"the content must be an object, not \[\]"),
        ({"a": math.nan}, {"a": schema.FINITE}, "a must be a finite number, not nan"),
        ({"a": math.inf}, {"a": schema.FINITE}, "a must be a finite number, not inf"),
        ({"a": math.nan}, {"a": schema.NUMBER}, None),
        ({"a": 10**400}, {"a": schema.NUMBER}, "a must be a number"),
        ({"a": "ok.txt"}, {"a": schema.NAME}, None),
        *(
            ({"a": x}, {"a": schema.NAME}, "a must be a plain")
            for x in ("", "..", "a/b", "a\\b", ".a", "a\n", 1)
        ),
        *(({"a": x}, {"a": schema.TEXT}, "a must be text") for x in ("a\0b", "\ud800", 1, [], b"x")),
    ],
)
def test_check(value, wanted, message):
    if message is None:
        return schema.check(value, wanted)
    with pytest.raises(ValueError, match="^" + message):
        schema.check(value, wanted)


@pytest.mark.parametrize("content", BYTES, ids=lambda content: repr(content[:12]))
def test_no_json_object(content, tmp_path):
    file = tmp_path / "x.json"
    file.write_bytes(content)
    assert refused(lambda: schema.read_json(file, {"a": schema.COUNT}), "x.json")


def test_no_file(tmp_path):
    for name in ("missing", "folder", "fifo", "link"):
        file = tmp_path / name
        if name == "folder":
            file.mkdir()
        elif name == "fifo" and hasattr(os, "mkfifo"):
            os.mkfifo(file)
        elif name == "link":
            file.symlink_to(file)
        assert refused(lambda file=file: schema.read_json(file, {}), name)


# ----------------------------------------------------------------------------------------------------------
# Prepared data


@pytest.fixture
def mini(corpus, tmp_path, monkeypatch) -> Path:
    """A copy of the corpus `mini` as data/mini/byte in the current directory."""
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(corpus, "data"), "mini", "byte")


def test_junk_in_meta_json(mini):
    """Each value in turn: the data load, if it does no harm, or file and key are named."""
    meta = json.loads((mini / "meta.json").read_text())
    found = {}
    for place in [*places(meta), ("limit",), ("floor_bpb",), ("version",), ("split",)]:
        for value in JUNK:
            (mini / "meta.json").write_text(json.dumps(changed(meta, place, value)))
            message = refused(lambda: datasets.load_data(mini), "meta.json", ".bin", "vocabulary")
            found.setdefault(place, []).append(bool(message))
            if message and "bin has" not in message and "another vocabulary" not in message:
                assert ".".join(place) in message and "python prepare.py mine" not in message
    harmless = {place for place, refusals in found.items() if not any(refusals)}
    unread = ("dropped_empty", "dropped_in_val", "repaired_marks", "source_files")
    assert harmless == {("tokenizer", "kind"), *((name,) for name in unread)}
    needed = {("corpus",), ("tokenizer",), ("dtype",), ("train",), ("val",)}
    needed |= {("tokenizer", name) for name in ("name", "vocab_size", "sha256")}
    needed |= {(split, name) for split in ("train", "val") for name in ("stories", "tokens", "bytes")}
    for place in places(meta):
        (mini / "meta.json").write_text(json.dumps(changed(meta, place, 0, remove=True)))
        message = refused(lambda: datasets.load_data(mini), "meta.json")
        assert (f"{'.'.join(place)} is missing" in message) == (place in needed)


@pytest.mark.parametrize(
    "harm,message",
    [
        (dict(train__stories=10**6), "train.bin has 39 stories, not 1,000,000"),
        (dict(val__stories=2), "val.bin has 1 stories, not 2 as"),
        (
            dict(tokenizer__vocab_size=300),
            "train.bin has an id 256, and the vocabulary in meta.json ends at 299",
        ),
        (
            dict(tokenizer__vocab_size=256),
            "train.bin has an id 256, and the vocabulary in meta.json ends at 255",
        ),
        (dict(tokenizer__name="bpe300"), "tokenizer.json: there is no such file"),
        (dict(tokenizer__name="../byte"), "tokenizer.name must be gpt2, byte or bpeN, not '../byte'"),
        (dict(tokenizer__sha256="0"), "another vocabulary"),
        (dict(dtype="uint32"), "train.bin has .* bytes"),
        (dict(dtype="float16"), "dtype must be uint16 or uint32, not 'float16'"),
        (dict(train__tokens=0), "train.tokens must be a whole number from 1 on, not 0"),
        (dict(corpus="../x"), "corpus must be a plain name"),
    ],
    ids=str,
)
def test_what_is_wrong_with_meta_json(harm, message, mini, capsys):
    meta = json.loads((mini / "meta.json").read_text())
    for place, value in harm.items():
        meta = changed(meta, tuple(place.split("__")), value)
    (mini / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(ValueError, match=message):
        datasets.load_data(mini)
    status = train.main(cli_args("data"))
    assert "python prepare.py mini --tokenizer byte" in said(capsys, status) and status == 2


@pytest.mark.parametrize("content", BYTES, ids=lambda content: repr(content[:12]))
def test_meta_json_that_is_none(content, mini):
    (mini / "meta.json").write_bytes(content)
    assert refused(lambda: datasets.load_data(mini), "meta.json")
    assert datasets.prepared(mini.parent) == {}


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("place", [0, 1, 20, -1], ids=str)
def test_an_id_past_the_vocabulary(place, split, mini):
    """Wherever it is, and even if meta.json says that there are so many ids."""
    ids = np.fromfile(mini / f"{split}.bin", "<u2")
    ids[place] = 300
    ids.tofile(mini / f"{split}.bin")
    assert "has an id 300" in refused(lambda: datasets.load_data(mini), f"{split}.bin")
    meta = json.loads((mini / "meta.json").read_text())
    (mini / "meta.json").write_text(json.dumps(changed(meta, ("tokenizer", "vocab_size"), 301)))
    assert refused(lambda: datasets.load_data(mini), ".bin")


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("size", [0, 1, 3, -1, -2, 2])
def test_bins_of_another_size(size, split, mini, capsys):
    content = (mini / f"{split}.bin").read_bytes()
    (mini / f"{split}.bin").write_bytes(content + b"ab" if size == 2 else content[:size])
    assert f"{split}.bin has" in refused(lambda: datasets.load_data(mini), f"{split}.bin")
    assert train.main(cli_args("data")) == 2 and f"{split}.bin has" in said(capsys, 2)


def test_a_folder_instead_of_a_bin(mini):
    (mini / "val.bin").unlink()
    (mini / "val.bin").mkdir()
    assert "has 0 bytes" in refused(lambda: datasets.load_data(mini), "val.bin")


@pytest.mark.parametrize("name", ["../mini", "mini/../mini", "..", ".", "", "a\0b", "/mini", "mini/byte"])
@pytest.mark.parametrize("setting", ["dataset", "tokenizer"])
def test_names_that_are_paths(setting, name, mini, capsys):
    """Even where a path leads to prepared data."""
    assert train.main(cli_args("data", **{setting: name})) == 2
    said(capsys, 2)
    assert [path.name for path in Path("data").iterdir() if not path.name.startswith(".")] == ["mini"]


# ----------------------------------------------------------------------------------------------------------
# metrics.jsonl and config.json of a run


GOOD = '{"step": 1, "split": "train", "loss": NaN, "lr": 0.1, "grad_norm": 1, "tokens": 2, "elapsed_s": 3, '
GOOD += '"tokens_per_s": 4}'


def test_junk_in_metrics_jsonl(tmp_path, capsys):
    line, file = json.loads(GOOD), tmp_path / "metrics.jsonl"
    bad = [json.dumps(changed(line, place, value)) for place in places(line) for value in ("x", None, [], {})]
    bad += [json.dumps(changed(line, place, value)) for place in (("step",), ("split",)) for value in JUNK]
    bad = [text for text in bad if text not in (json.dumps(changed(line, ("step",), n)) for n in (0, 1))]
    bad += [json.dumps(changed(line, place, 0, remove=True)) for place in places(line)]
    bad += [json.dumps(changed(line, ("elapsed_s",), x)) for x in (math.nan, math.inf, 10**400)]
    content = [text.encode("utf-8", "surrogatepass") for text in bad] + [text for text in BYTES if text]
    for one in content:
        file.write_bytes(b"\n".join([GOOD.encode(), one, GOOD.encode(), b""]))
        assert [x["step"] for x in runs.read_metrics(tmp_path)] == [1, 1], one
        found = capsys.readouterr().err
        assert found.count("\n") == 1 and "metrics.jsonl: 1 of " in found, (one, found)
    file.write_bytes(b"\n".join([GOOD.encode(), *content, GOOD.encode(), b'{"step": 3, "spl']))
    assert len(runs.read_metrics(tmp_path)) == 2
    found = capsys.readouterr().err
    assert found.count("\n") == 1 and f"{len(content)} of " in found, "one warning for all"
    file.write_text(f'{GOOD}\n\n{GOOD}\n{{"step": 3, "spl')
    assert len(runs.read_metrics(tmp_path)) == 2 and not capsys.readouterr().err, "torn by a kill"


def test_a_run_with_junk_in_its_metrics_resumes(main):
    assert main("straight") == 0
    assert main("run", stop_after=10) == 143
    with open("run/metrics.jsonl", "ab") as file:
        file.write(b'3\n{"step": 4}\n\xff\n')
    assert main("run", "--resume") == 0 and main.stderr.count("WARNING: run/metrics.jsonl: 3 of") == 1
    assert metrics("run") == metrics("straight")


@pytest.mark.parametrize("content", BYTES, ids=lambda content: repr(content[:12]))
def test_a_config_json_that_is_none(content, tmp_path):
    (tmp_path / "config.json").write_bytes(content)
    assert runs.read_config(tmp_path) == {}


# ----------------------------------------------------------------------------------------------------------
# Checkpoints


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict:
    """The dictionary in latest.pt of a run with both optimizers and a gradient scaler."""
    folder = tmp_path_factory.mktemp("whole")
    t = trainer(out_dir=folder, optimizer="muon", dtype="float16")
    t.train_step(0)
    t.save_checkpoint(1)
    return checkpoint.read(folder / "latest.pt")


def write(state: dict, *names: str) -> None:
    for name in names:
        Path("run").mkdir(exist_ok=True)
        checkpoint.save(Path("run", name), state)
    Path("run/metrics.jsonl").touch()


SETTINGS = [("train_config", name) for name in ("dataset", "tokenizer", "data_dir")]


def test_junk_in_what_a_model_takes(whole, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    state = {k: whole[k] for k in ("format", "model", "model_config", "tokenizer", "step", "train_config")}
    for place in places(state):
        if place[:2] == ("train_config", "model") or place[:1] == ("train_config",) and place not in SETTINGS:
            continue
        for value in JUNK:
            write(changed(state, place, value), "best.pt")
            message = refused(lambda: checkpoint.load("run"), "best.pt")
            if place[0] == "model" or type(value) in (list, dict):
                assert message and (".".join(place) in message or place[-1] in message)
    for name in ("model", "model_config", "tokenizer"):
        write({k: v for k, v in state.items() if k != name}, "best.pt")
        assert f"{name} is missing" in refused(lambda: checkpoint.load("run"), "best.pt")


TENSORS = {  # instead of a vector of 16 ones
    "missing": None,
    "shape": lambda x: torch.ones(17),
    "0-dim": lambda x: torch.ones(()),
    "2-dim": lambda x: x[:, None],
    "empty": lambda x: x[:0],
    "float64": lambda x: x.double(),
    "float16": lambda x: x.half(),
    "int64": lambda x: x.long(),
    "bool": lambda x: x.bool(),
    "complex": lambda x: x.to(torch.complex64),
    "sparse": lambda x: x.to_sparse(),
    "csr": lambda x: torch.ones(16, 16).to_sparse_csr(),
    "expanded": lambda x: x[:1].expand(16),
    "huge": lambda x: x[:1].expand(10**12),
    "strided": lambda x: torch.ones(16, 2)[:, 0],
    "meta": lambda x: x.to("meta"),
    "quantized": lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8),
    "list": lambda x: x.tolist(),
    "number": lambda x: 1.0,
}


@pytest.mark.parametrize("kind", TENSORS)
@pytest.mark.filterwarnings("ignore")
def test_weights_that_do_not_fit_the_configuration(kind, whole, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    name = "core.blocks.1.norm1.weight"
    model = {k: x for k, x in whole["model"].items() if k != name}
    if TENSORS[kind]:
        model[name] = TENSORS[kind](torch.ones(16))
    write(whole | {"model": model}, "best.pt", "latest.pt")
    for main in (sample.main, evaluate.main):
        assert main(["--out_dir=run"]) == 2
        assert name in said(capsys, 2)


def test_weights_that_no_configuration_has(whole, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("core.blocks.2.norm1.weight", "x", ""):
        write(whole | {"model": dict(whole["model"]) | {name: torch.ones(16)}}, "best.pt")
        assert f"the tensor {name} is" in refused(lambda: checkpoint.load("run"), "best.pt")
    for key in (1, None, (1, 2)):
        write(whole | {"model": dict(whole["model"]) | {key: torch.ones(16)}}, "best.pt")
        assert refused(lambda: checkpoint.load("run"), "best.pt")


@pytest.mark.parametrize(
    "changes",
    [dict(n_layer=1), dict(n_embd=8), dict(mlp="gelu"), dict(tied=False), dict(vocab_size=258)],
    ids=str,
)
def test_a_configuration_that_does_not_fit_the_weights(changes, whole, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(whole | {"model_config": whole["model_config"] | changes}, "best.pt")
    assert refused(lambda: checkpoint.load("run"), "best.pt") or changes == dict(tied=False)


@pytest.mark.parametrize(
    "state,message",
    [
        (dict(name="byte", ranks=""), "ranks must list the bytes in order"),
        (dict(name="bpe257", ranks="AA== 0\n"), "each of the 256 bytes"),
        (dict(name="../x", ranks=""), "tokenizer.name must be gpt2, byte or bpeN, not '../x'"),
        (dict(name="x\0", ranks=""), "tokenizer.name must be gpt2, byte or bpeN"),
        (dict(name="bpe5", ranks=""), "tokenizer.name must be gpt2, byte or bpeN"),
        (dict(name="byte", ranks="AA== 1\n"), "ranks"),
        (dict(name="byte", ranks="AA==\n"), "ranks"),
        (dict(name="byte", ranks="!!!! 0\n"), "best.pt"),
        (dict(name="byte", ranks="AA== x\n"), "best.pt"),
        (dict(name="byte"), "tokenizer.ranks is missing"),
        (dict(ranks=""), "tokenizer.name is missing"),
        ([1], "tokenizer must be an object"),
    ],
    ids=str,
)
def test_junk_in_the_tokenizer_of_a_checkpoint(state, message, whole, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(whole | {"tokenizer": state}, "best.pt")
    assert message in refused(lambda: checkpoint.load("run"), "best.pt")


def test_a_tokenizer_that_does_not_fit_the_model(whole, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    other = tokenizer.Tokenizer("bpe258", [*(bytes([b]) for b in range(256)), b"ab"])
    write(whole | {"tokenizer": other.state()}, "best.pt")
    assert "model_config.vocab_size must be" in refused(lambda: checkpoint.load("run"), "best.pt")
    swapped = [bytes([b]) for b in range(1, 256)] + [b"\0"]
    write(whole | {"tokenizer": tokenizer.Tokenizer("bpe257", swapped).state() | {"name": "byte"}}, "best.pt")
    assert "ranks" in refused(lambda: checkpoint.load("run"), "best.pt"), (
        "encode() of byte takes ids for bytes"
    )


@pytest.fixture(scope="module")
def stopped(tmp_path_factory, corpus) -> dict:
    """The dictionary in latest.pt of a run on the corpus `mini` that was stopped."""
    folder = tmp_path_factory.mktemp("stopped")
    run = Program(cli_args(corpus, out_dir="run", max_iters=6, save_interval=3), folder)
    assert run.wait() == 0
    return checkpoint.read(folder / "run" / "previous.pt")


RESUMES = ["train_config", "progress", "optimizers", "scaler", "data", "compiled", "machine", "provenance"]
RESUMES += ["recipe"]


def test_junk_in_what_a_run_resumes_from(stopped, tmp_path, monkeypatch):
    """As far as the file says it; what only the trainer notices is below."""
    monkeypatch.chdir(tmp_path)
    values = stopped["train_config"] | stopped["model_config"]
    values = {k: v for k, v in values.items() if k != "model"}
    for place in places({name: stopped[name] for name in RESUMES if name != "optimizers"}):
        if place[:2] == ("train_config", "model"):
            continue
        for value in JUNK:
            write(changed(stopped, place, value), "latest.pt")
            message = refused(lambda: runs.last_state(Path("run"), values), "latest.pt")
            if type(value) in (list, dict) and value and place[0] not in ("scaler", "data", "recipe"):
                assert ".".join(place) in message
    for name in RESUMES:
        write({k: v for k, v in stopped.items() if k != name}, "latest.pt")
        assert f"{name} is missing" in refused(lambda: runs.last_state(Path("run"), values), "latest.pt")


def moments(state: dict, **changes) -> dict:
    """A checkpoint with other values in the first parameter's state of its optimizer."""
    first, *others = state["optimizers"]
    kept = {k: v for k, v in (first["state"][0] | changes).items() if v is not None}
    return state | {"optimizers": [first | {"state": first["state"] | {0: kept}}, *others]}


def optimizer(checkpoint: dict, **changes) -> dict:
    """A checkpoint with other entries in the dictionary of its first optimizer."""
    return checkpoint | {"optimizers": [checkpoint["optimizers"][0] | changes]}


@pytest.mark.parametrize(
    "harm",
    [
        lambda s: s | {"optimizers": []},
        lambda s: s | {"optimizers": s["optimizers"] * 2},
        lambda s: s | {"optimizers": {}},
        lambda s: s | {"optimizers": [3]},
        lambda s: optimizer(s, state=[]),
        lambda s: optimizer(s, state={0: 1}),
        lambda s: optimizer(s, param_groups=[]),
        lambda s: optimizer(s, param_groups=[{}]),
        lambda s: optimizer(s, param_groups=[{"params": []}] * 2),
        lambda s: optimizer(s, param_groups=[{"params": ["x"]}]),
        lambda s: moments(s, step=None),
        lambda s: moments(s, step=torch.ones(5)),
        lambda s: moments(s, step="x"),
        lambda s: moments(s, exp_avg=None),
        lambda s: moments(s, exp_avg=torch.ones(3)),
        lambda s: moments(s, exp_avg=torch.ones(1).expand(320, 16)),
        lambda s: moments(s, exp_avg_sq=None),
        lambda s: moments(s, exp_avg_sq=torch.ones(320, 16, 1)),
        lambda s: moments(s, other=torch.ones(1)),
        lambda s: s | {"model": {}},
        lambda s: s | {"model": dict(s["model"]) | {"x": torch.ones(1)}},
        lambda s: s | {"data": {}},
        lambda s: changed(s, ("train_config", "learning_rate"), "x"),
        lambda s: changed(s, ("train_config", "batch_size"), 0),
        lambda s: changed(s, ("train_config", "eval_interval"), 0),
        lambda s: changed(s, ("train_config", "flavour"), 1),
        lambda s: changed(s, ("train_config", "seed"), -1),
        lambda s: changed(s, ("train_config", "dataset"), "../mini"),
        lambda s: changed(s, ("train_config", "tokenizer"), "../byte"),
        lambda s: changed(s, ("train_config", 5), 1),
        lambda s: changed(s, ("model_config", "n_head"), 0),
        lambda s: changed(s, ("model_config", "flavour"), 0),
        lambda s: changed(s, ("progress", "step"), -1),
        lambda s: changed(s, ("progress", "flavour"), -1),
        lambda s: changed(s, ("progress", "best"), None),
        lambda s: changed(s, ("recipe", "max_iters"), "x"),
        lambda s: changed(s, ("recipe", "flavour"), torch.ones(2)),
        lambda s: s | {"format": 0},
        lambda s: s | {"format": "2"},
        lambda s: s | {"format": 99},
        lambda s: s | {"format": 1},
    ],
)
def test_a_checkpoint_that_does_not_resume(harm, stopped, corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write(harm(copy.deepcopy(stopped)), "latest.pt")
    status = train.main(cli_args(corpus, out_dir="run", max_iters=6, save_interval=3) + ["--resume"])
    assert status == 2, capsys.readouterr().err
    said(capsys, status)


def test_the_unharmed_checkpoint_resumes(stopped, corpus, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(stopped, "latest.pt")
    assert train.main(cli_args(corpus, out_dir="run", max_iters=6, save_interval=3) + ["--resume"]) == 0


def test_the_one_before_is_taken(stopped, whole, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    values = stopped["train_config"] | stopped["model_config"]
    write(changed(stopped, ("progress", "step"), "x"), "latest.pt")
    write(stopped, "previous.pt")
    state = runs.last_state(Path("run"), {k: v for k, v in values.items() if k != "model"})
    assert state["file"] == "previous.pt"
    assert "WARNING: run/latest.pt: progress.step must be" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------------
# A foreign model


@pytest.fixture(scope="module")
def foreign(tmp_path_factory) -> Path:
    """A folder of transformers, with its weights in two files."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path_factory.mktemp("foreign")
    t = trainer(qk_norm=True)
    hf.to_hf(t.model, t.data.tokenizer, folder)
    whole = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    files = {name: f"model-{1 + (name > 'model.l')}.safetensors" for name in whole}
    for file in set(files.values()):
        save_file({name: x for name, x in whole.items() if files[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    return folder


@pytest.fixture
def copied(foreign, tmp_path) -> Path:
    return Path(shutil.copytree(foreign, tmp_path / "theirs"))


JSONS = ["config.json", "tokenizer.json", "model.safetensors.index.json"]


def test_the_unharmed_foreign_model_loads(copied):
    hf.from_hf(copied)


@pytest.mark.parametrize("file", JSONS)
@pytest.mark.parametrize("content", BYTES, ids=lambda content: repr(content[:12]))
def test_a_foreign_file_that_is_no_json_object(content, file, copied):
    (copied / file).write_bytes(content)
    assert refused(lambda: hf.from_hf(copied), file)


@pytest.mark.parametrize("file", JSONS)
def test_junk_in_a_foreign_file(file, copied):
    data = json.loads((copied / file).read_text())
    data["model"] = (
        {**data["model"], "vocab": {"a": 1, "b": 2}} if file == JSONS[1] else data.get("model", {})
    )
    for place in places(data):
        for value in JUNK:
            (copied / file).write_text(json.dumps(changed(data, place, value)))
            refused(lambda: hf.from_hf(copied), *JSONS, "has no equivalent", "has shape", "theirs")
        (copied / file).write_text(json.dumps(changed(data, place, 0, remove=True)))
        refused(lambda: hf.from_hf(copied), *JSONS, "has no equivalent", "has shape", "theirs")


@pytest.mark.parametrize(
    "file,change,message",
    [
        ("config.json", dict(num_attention_heads=0), "config.json: num_attention_heads must be a whole"),
        ("config.json", dict(num_hidden_layers="2"), "config.json: num_hidden_layers must be a whole number"),
        ("config.json", dict(num_hidden_layers=1), "has no equivalent"),
        ("config.json", dict(hidden_size=[8]), "config.json: hidden_size must be a whole number"),
        ("config.json", dict(rms_norm_eps="x"), "config.json: rms_norm_eps must be a number"),
        (
            "config.json",
            dict(tie_word_embeddings="yes"),
            "config.json: tie_word_embeddings must be true or false",
        ),
        ("config.json", dict(model_type=3), "config.json: model_type must be text"),
        ("config.json", dict(rope_parameters=3), "config.json: rope_parameters must be an object"),
        ("config.json", dict(rope_theta=[1]), "config.json: rope_theta must be a number"),
        ("config.json", dict(eos_token_id=[]), "eos_token_id=None"),
        ("tokenizer.json", dict(model=3), "tokenizer.json: model must be an object"),
        ("tokenizer.json", dict(model={"vocab": {"a": -1}}), "tokenizer.json: model.vocab.a must be"),
        ("tokenizer.json", dict(model={"vocab": {}}), "tokenizer.json: model.merges is missing"),
        (
            "tokenizer.json",
            dict(added_tokens=[{"id": 1}]),
            "tokenizer.json: added_tokens.0.content is missing",
        ),
        (JSONS[2], dict(weight_map={"x": "../model-1.safetensors"}), "weight_map.x must be a plain name"),
        (JSONS[2], dict(weight_map={"x": "model-3.safetensors"}), "model-3.safetensors"),
        (JSONS[2], dict(weight_map={"x": "config.json"}), "config.json: SafetensorError"),
        (JSONS[2], dict(weight_map={}), "has shape [0]"),
        (JSONS[2], dict(weight_map={"x": 3}), "weight_map.x must be a plain name, not 3"),
    ],
    ids=str,
)
def test_what_is_wrong_with_a_foreign_file(file, change, message, copied, tmp_path, monkeypatch, capsys):
    data = json.loads((copied / file).read_text())
    (copied / file).write_text(json.dumps(data | change))
    monkeypatch.chdir(tmp_path)
    assert train.main(["--init_from=hf:theirs", "--dataset=none"]) == 2
    assert message in said(capsys, 2)


@pytest.mark.parametrize("size", [0, 1, 8, 100, 3000])
def test_foreign_weights_that_are_cut(size, copied):
    os.truncate(copied / "model-2.safetensors", size)
    assert refused(lambda: hf.from_hf(copied), "model-2.safetensors")


@pytest.mark.parametrize("kind", ["missing", "shape", "0-dim", "2-dim", "empty", "int64", "bool", "complex"])
@pytest.mark.parametrize("name", ["model.norm.weight", "model.embed_tokens.weight"])
def test_foreign_weights_that_do_not_fit(kind, name, copied):
    from safetensors.torch import load_file, save_file

    for file in copied.glob("*.safetensors"):
        if name in (found := load_file(file)):
            found.pop(name)
            save_file(found | ({name: TENSORS[kind](torch.ones(16))} if TENSORS[kind] else {}), file)
    assert name in refused(lambda: hf.from_hf(copied), "theirs: ")


# ----------------------------------------------------------------------------------------------------------
# Files that are truncated during a run


def truncate(file: str, size: int) -> None:
    """In the process of a run: cut a file of its data in place in the fourth update."""
    real = train.Trainer.train_step

    def step(self, n):
        if n == 3:
            os.truncate(file, size)
        return real(self, n)

    train.Trainer.train_step = step


@pytest.mark.skipif(os.name == "nt", reason="Windows does not truncate a file that is mapped")
@pytest.mark.parametrize(
    "file,size", [("train.bin", 0), ("train.bin", 4096), ("val.bin", 0), ("val.bin", 100)]
)
def test_a_bin_truncated_during_a_run(file, size, mini, tmp_path):
    """Without the check, the process dies of SIGBUS, or trains on zeros."""
    path = str(mini / file)
    run = Program(cli_args("data", out_dir="run", save_interval=2), tmp_path, hook=(truncate, path, size))
    assert run.wait() == 1, run.text
    found = [line for line in run.text.splitlines() if "error" in line]
    assert len(found) == 1 and f"{file} was truncated" in found[0]
    assert checkpoint.read(tmp_path / "run/latest.pt")["step"] == (2 if file == "train.bin" else 4)


@pytest.mark.skipif(os.name == "nt", reason="Windows does not rename a folder whose files are mapped")
def test_data_made_anew_during_a_run(mini):
    """The run goes on with the files that it has opened, whatever the size of those that replace them."""
    data = datasets.load_data(mini)
    mini.rename("old")
    mini.mkdir()
    (mini / "train.bin").write_bytes(b"")
    shutil.rmtree("old")
    datasets.check_size(data.train)
    datasets.check_size(datasets.first_stories(data.train, 256, 2))
