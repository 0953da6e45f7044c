"""
Invalid files: prepared data, runs, checkpoints, models of Hugging Face. Each is a one-line error that names
the file and the key.

For each kind of file, junk of every type replaces each of its values.
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
NOT_OBJECTS = [text.encode() for text in TEXTS] + [b"\xff\xfe{}", b"\0\0\0", b"{\xc3}"]


def key_paths(data, prefix: tuple = ()):
    """The paths of all values in nested dicts, as tuples of keys."""
    for key, value in data.items():
        yield (*prefix, key)
        if isinstance(value, dict):
            yield from key_paths(value, (*prefix, key))


def with_value(data: dict, keys: tuple, value, remove: bool = False) -> dict:
    """A copy of nested dicts with another value at a key path, or with the key removed."""
    data = copy.deepcopy(data)
    inner = data
    for key in keys[:-1]:
        inner = inner[key]
    if remove:
        del inner[keys[-1]]
    else:
        inner[keys[-1]] = value
    return data


def error_message(call, *files: str) -> str:
    """Call it -> the message of the error it raises, which is one line with the name of a file, or ""."""
    try:
        call()
    except (ValueError, FileNotFoundError) as error:
        message = str(error)
        assert "\n" not in message.strip() and any(file in message for file in files), message
        return message
    return ""


def error_line(capsys, status: int) -> str:
    """The only error line on stderr of a script that exited with status 1 or 2."""
    lines = [line for line in capsys.readouterr().err.splitlines() if "rror" in line]
    assert status in (1, 2) and len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


# ----------------------------------------------------------------------------------------------------------
# check() and read_json()


@pytest.mark.parametrize(
    "value,expected,message",
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
def test_check(value, expected, message):
    if message is None:
        return schema.check(value, expected)
    with pytest.raises(ValueError, match="^" + message):
        schema.check(value, expected)


@pytest.mark.parametrize("content", NOT_OBJECTS, ids=lambda content: repr(content[:12]))
def test_read_json_raises_if_content_is_not_an_object(content, tmp_path):
    file = tmp_path / "x.json"
    file.write_bytes(content)
    assert error_message(lambda: schema.read_json(file, {"a": schema.COUNT}), "x.json")


def test_read_json_raises_if_there_is_no_file(tmp_path):
    for name in ("missing", "folder", "fifo", "link"):
        file = tmp_path / name
        if name == "folder":
            file.mkdir()
        elif name == "fifo" and hasattr(os, "mkfifo"):
            os.mkfifo(file)
        elif name == "link":
            file.symlink_to(file)
        assert error_message(lambda file=file: schema.read_json(file, {}), name)


# ----------------------------------------------------------------------------------------------------------
# Prepared data


@pytest.fixture
def mini(corpus, tmp_path, monkeypatch) -> Path:
    """A copy of the corpus `mini` as data/mini/byte in the current directory."""
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(corpus, "data"), "mini", "byte")


def test_junk_values_in_meta_json(mini):
    """For each value, either the data load, because it is unused, or the error names file and key."""
    meta = json.loads((mini / "meta.json").read_text())
    errors = {}
    for keys in [*key_paths(meta), ("limit",), ("floor_bpb",), ("version",), ("split",)]:
        for value in JUNK:
            (mini / "meta.json").write_text(json.dumps(with_value(meta, keys, value)))
            message = error_message(lambda: datasets.load_data(mini), "meta.json", ".bin", "vocabulary")
            errors.setdefault(keys, []).append(bool(message))
            if message and "bin has" not in message and "was prepared with a different" not in message:
                assert ".".join(keys) in message and "python prepare.py mine" not in message
    unchecked = {keys for keys, raised in errors.items() if not any(raised)}
    unused = ("dropped_empty", "dropped_in_val", "repaired_marks", "source_files")
    assert unchecked == {("tokenizer", "kind"), *((name,) for name in unused)}
    required = {("corpus",), ("tokenizer",), ("dtype",), ("train",), ("val",)}
    required |= {("tokenizer", name) for name in ("name", "vocab_size", "sha256")}
    required |= {(split, name) for split in ("train", "val") for name in ("stories", "tokens", "bytes")}
    for keys in key_paths(meta):
        (mini / "meta.json").write_text(json.dumps(with_value(meta, keys, 0, remove=True)))
        message = error_message(lambda: datasets.load_data(mini), "meta.json")
        assert (f"{'.'.join(keys)} is missing" in message) == (keys in required)


@pytest.mark.parametrize(
    "change,message",
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
        (dict(tokenizer__sha256="0"), "was prepared with a different"),
        (dict(dtype="uint32"), "train.bin has .* bytes"),
        (dict(dtype="float16"), "dtype must be uint16 or uint32, not 'float16'"),
        (dict(train__tokens=0), "train.tokens must be a whole number from 1 on, not 0"),
        (dict(corpus="../x"), "corpus must be a plain name"),
    ],
    ids=str,
)
def test_invalid_meta_json(change, message, mini, capsys):
    meta = json.loads((mini / "meta.json").read_text())
    for keys, value in change.items():
        meta = with_value(meta, tuple(keys.split("__")), value)
    (mini / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(ValueError, match=message):
        datasets.load_data(mini)
    status = train.main(cli_args("data"))
    assert "python prepare.py mini --tokenizer byte" in error_line(capsys, status) and status == 2


@pytest.mark.parametrize("content", NOT_OBJECTS, ids=lambda content: repr(content[:12]))
def test_meta_json_that_is_not_an_object(content, mini):
    (mini / "meta.json").write_bytes(content)
    assert error_message(lambda: datasets.load_data(mini), "meta.json")
    assert datasets.prepared(mini.parent) == {}


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("index", [0, 1, 20, -1], ids=str)
def test_id_outside_the_vocabulary(index, split, mini):
    """At any position, and also if the vocabulary in meta.json is that large."""
    ids = np.fromfile(mini / f"{split}.bin", "<u2")
    ids[index] = 300
    ids.tofile(mini / f"{split}.bin")
    assert "has an id 300" in error_message(lambda: datasets.load_data(mini), f"{split}.bin")
    meta = json.loads((mini / "meta.json").read_text())
    (mini / "meta.json").write_text(json.dumps(with_value(meta, ("tokenizer", "vocab_size"), 301)))
    assert error_message(lambda: datasets.load_data(mini), ".bin")


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("size", [0, 1, 3, -1, -2, 2])
def test_bin_of_wrong_size(size, split, mini, capsys):
    content = (mini / f"{split}.bin").read_bytes()
    (mini / f"{split}.bin").write_bytes(content + b"ab" if size == 2 else content[:size])
    assert f"{split}.bin has" in error_message(lambda: datasets.load_data(mini), f"{split}.bin")
    assert train.main(cli_args("data")) == 2 and f"{split}.bin has" in error_line(capsys, 2)


def test_bin_that_is_a_folder(mini):
    (mini / "val.bin").unlink()
    (mini / "val.bin").mkdir()
    assert "has 0 bytes" in error_message(lambda: datasets.load_data(mini), "val.bin")


@pytest.mark.parametrize("name", ["../mini", "mini/../mini", "..", ".", "", "a\0b", "/mini", "mini/byte"])
@pytest.mark.parametrize("setting", ["dataset", "tokenizer"])
def test_dataset_and_tokenizer_must_not_be_paths(setting, name, mini, capsys):
    """Even if the path leads to prepared data."""
    before = {path for path in Path("data").iterdir() if not path.name.startswith(".")}
    assert train.main(cli_args("data", **{setting: name})) == 2
    error_line(capsys, 2)
    assert {path for path in Path("data").iterdir() if not path.name.startswith(".")} == before


# ----------------------------------------------------------------------------------------------------------
# metrics.jsonl and config.json of a run


VALID_LINE = '{"step": 1, "split": "train", "loss": NaN, "lr": 0.1, "grad_norm": 1, "tokens": 2, '
VALID_LINE += '"elapsed_s": 3, "tokens_per_s": 4}'


def test_junk_lines_in_metrics_jsonl(tmp_path, capsys):
    line, file = json.loads(VALID_LINE), tmp_path / "metrics.jsonl"
    bad = [
        json.dumps(with_value(line, keys, value)) for keys in key_paths(line) for value in ("x", None, [], {})
    ]
    bad += [json.dumps(with_value(line, keys, value)) for keys in (("step",), ("split",)) for value in JUNK]
    bad = [text for text in bad if text not in (json.dumps(with_value(line, ("step",), n)) for n in (0, 1))]
    bad += [json.dumps(with_value(line, keys, 0, remove=True)) for keys in key_paths(line)]
    bad += [json.dumps(with_value(line, ("elapsed_s",), x)) for x in (math.nan, math.inf, 10**400)]
    content = [text.encode("utf-8", "surrogatepass") for text in bad] + [text for text in NOT_OBJECTS if text]
    for junk in content:
        file.write_bytes(b"\n".join([VALID_LINE.encode(), junk, VALID_LINE.encode(), b""]))
        assert [x["step"] for x in runs.read_metrics(tmp_path)] == [1, 1], junk
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and "metrics.jsonl: 1 of " in err, (junk, err)
    file.write_bytes(b"\n".join([VALID_LINE.encode(), *content, VALID_LINE.encode(), b'{"step": 3, "spl']))
    assert len(runs.read_metrics(tmp_path)) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and f"{len(content)} of " in err, "one warning for all"
    file.write_text(f'{VALID_LINE}\n\n{VALID_LINE}\n{{"step": 3, "spl')
    assert len(runs.read_metrics(tmp_path)) == 2 and not capsys.readouterr().err, (
        "an incomplete last line, as after a kill"
    )


def test_run_with_junk_in_metrics_jsonl_resumes(main):
    assert main("straight") == 0
    assert main("run", stop_after=10) == 143
    with open("run/metrics.jsonl", "ab") as file:
        file.write(b'3\n{"step": 4}\n\xff\n')
    assert main("run", "--resume") == 0 and main.stderr.count("WARNING: run/metrics.jsonl: 3 of") == 1
    assert metrics("run") == metrics("straight")


@pytest.mark.parametrize("content", NOT_OBJECTS, ids=lambda content: repr(content[:12]))
def test_config_json_that_is_not_an_object(content, tmp_path):
    (tmp_path / "config.json").write_bytes(content)
    assert runs.read_config(tmp_path) == {}


# ----------------------------------------------------------------------------------------------------------
# Checkpoints


@pytest.fixture(scope="module")
def saved_state(tmp_path_factory) -> dict:
    """The state dict in latest.pt of a run with both optimizers and a gradient scaler."""
    folder = tmp_path_factory.mktemp("saved")
    t = trainer(out_dir=folder, optimizer="muon", dtype="float16")
    t.train_step(0)
    t.save_checkpoint(1)
    return checkpoint.read(folder / "latest.pt")


def save_checkpoints(state: dict, *names: str) -> None:
    """Save `state` in the run folder run/ under these names."""
    for name in names:
        Path("run").mkdir(exist_ok=True)
        checkpoint.save(Path("run", name), state)
    Path("run/metrics.jsonl").touch()


CHECKED_SETTINGS = [("train_config", name) for name in ("dataset", "tokenizer", "data_dir")]


def test_junk_values_in_a_checkpoint_for_inference(saved_state, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = ("format", "model", "model_config", "tokenizer", "step", "train_config")
    state = {name: saved_state[name] for name in names}
    for keys in key_paths(state):
        if (
            keys[:2] == ("train_config", "model")
            or keys[:1] == ("train_config",)
            and keys not in CHECKED_SETTINGS
        ):
            continue
        for value in JUNK:
            save_checkpoints(with_value(state, keys, value), "best.pt")
            message = error_message(lambda: checkpoint.load("run"), "best.pt")
            if keys[0] == "model" or type(value) in (list, dict):
                assert message and (".".join(keys) in message or keys[-1] in message)
    for name in ("model", "model_config", "tokenizer"):
        save_checkpoints({k: v for k, v in state.items() if k != name}, "best.pt")
        assert f"{name} is missing" in error_message(lambda: checkpoint.load("run"), "best.pt")


BAD_TENSORS = {  # replacements for a vector of 16 ones
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


@pytest.mark.parametrize("kind", BAD_TENSORS)
@pytest.mark.filterwarnings("ignore")
def test_weights_that_do_not_match_the_config(kind, saved_state, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    name = "core.blocks.1.norm1.weight"
    model = {k: x for k, x in saved_state["model"].items() if k != name}
    if BAD_TENSORS[kind]:
        model[name] = BAD_TENSORS[kind](torch.ones(16))
    save_checkpoints(saved_state | {"model": model}, "best.pt", "latest.pt")
    for main in (sample.main, evaluate.main):
        assert main(["--out_dir=run"]) == 2
        assert name in error_line(capsys, 2)


def test_unexpected_weights(saved_state, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("core.blocks.2.norm1.weight", "x", ""):
        save_checkpoints(
            saved_state | {"model": dict(saved_state["model"]) | {name: torch.ones(16)}}, "best.pt"
        )
        assert f"the tensor {name} is" in error_message(lambda: checkpoint.load("run"), "best.pt")
    for key in (1, None, (1, 2)):
        save_checkpoints(
            saved_state | {"model": dict(saved_state["model"]) | {key: torch.ones(16)}}, "best.pt"
        )
        assert error_message(lambda: checkpoint.load("run"), "best.pt")


@pytest.mark.parametrize(
    "changes",
    [dict(n_layer=1), dict(n_embd=8), dict(mlp="gelu"), dict(tied=False), dict(vocab_size=258)],
    ids=str,
)
def test_config_that_does_not_match_the_weights(changes, saved_state, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_checkpoints(saved_state | {"model_config": saved_state["model_config"] | changes}, "best.pt")
    assert error_message(lambda: checkpoint.load("run"), "best.pt") or changes == dict(tied=False)


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
def test_invalid_tokenizer_in_a_checkpoint(state, message, saved_state, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_checkpoints(saved_state | {"tokenizer": state}, "best.pt")
    assert message in error_message(lambda: checkpoint.load("run"), "best.pt")


def test_tokenizer_that_does_not_match_the_model(saved_state, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    other = tokenizer.Tokenizer("bpe258", [*(bytes([b]) for b in range(256)), b"ab"])
    save_checkpoints(saved_state | {"tokenizer": other.state()}, "best.pt")
    assert "model_config.vocab_size must be" in error_message(lambda: checkpoint.load("run"), "best.pt")
    swapped = [bytes([b]) for b in range(1, 256)] + [b"\0"]
    save_checkpoints(
        saved_state | {"tokenizer": tokenizer.Tokenizer("bpe257", swapped).state() | {"name": "byte"}},
        "best.pt",
    )
    assert "ranks" in error_message(lambda: checkpoint.load("run"), "best.pt"), (
        "encode() of `byte` relies on ids being bytes"
    )


@pytest.fixture(scope="module")
def resume_state(tmp_path_factory, corpus) -> dict:
    """The state dict of a run on the corpus `mini`, at step 3 of 6."""
    folder = tmp_path_factory.mktemp("resumable")
    run = Program(cli_args(corpus, out_dir="run", max_iters=6, save_interval=3), folder)
    assert run.wait() == 0
    return checkpoint.read(folder / "run" / "previous.pt")


RESUME_KEYS = ["train_config", "progress", "optimizers", "scaler", "data", "compiled", "machine"]
RESUME_KEYS += ["provenance", "recipe"]


def test_junk_values_in_a_checkpoint_for_resume(resume_state, tmp_path, monkeypatch):
    """Values that are checked when the file is read; the next test has those that the trainer checks."""
    monkeypatch.chdir(tmp_path)
    values = resume_state["train_config"] | resume_state["model_config"]
    values = {k: v for k, v in values.items() if k != "model"}
    for keys in key_paths({name: resume_state[name] for name in RESUME_KEYS if name != "optimizers"}):
        if keys[:2] == ("train_config", "model"):
            continue
        for value in JUNK:
            save_checkpoints(with_value(resume_state, keys, value), "latest.pt")
            message = error_message(lambda: runs.last_state(Path("run"), values), "latest.pt")
            if type(value) in (list, dict) and value and keys[0] not in ("scaler", "data", "recipe"):
                assert ".".join(keys) in message
    for name in RESUME_KEYS:
        save_checkpoints({k: v for k, v in resume_state.items() if k != name}, "latest.pt")
        assert f"{name} is missing" in error_message(
            lambda: runs.last_state(Path("run"), values), "latest.pt"
        )


def with_moments(state: dict, **changes) -> dict:
    """A checkpoint with changes of the first parameter's optimizer state; None removes a value."""
    first, *others = state["optimizers"]
    changed_state = {k: v for k, v in (first["state"][0] | changes).items() if v is not None}
    return state | {"optimizers": [first | {"state": first["state"] | {0: changed_state}}, *others]}


def with_optimizer(checkpoint: dict, **changes) -> dict:
    """A checkpoint with changes of the state dict of its first optimizer."""
    return checkpoint | {"optimizers": [checkpoint["optimizers"][0] | changes]}


@pytest.mark.parametrize(
    "change",
    [
        lambda s: s | {"optimizers": []},
        lambda s: s | {"optimizers": s["optimizers"] * 2},
        lambda s: s | {"optimizers": {}},
        lambda s: s | {"optimizers": [3]},
        lambda s: with_optimizer(s, state=[]),
        lambda s: with_optimizer(s, state={0: 1}),
        lambda s: with_optimizer(s, param_groups=[]),
        lambda s: with_optimizer(s, param_groups=[{}]),
        lambda s: with_optimizer(s, param_groups=[{"params": []}] * 2),
        lambda s: with_optimizer(s, param_groups=[{"params": ["x"]}]),
        lambda s: with_moments(s, step=None),
        lambda s: with_moments(s, step=torch.ones(5)),
        lambda s: with_moments(s, step="x"),
        lambda s: with_moments(s, exp_avg=None),
        lambda s: with_moments(s, exp_avg=torch.ones(3)),
        lambda s: with_moments(s, exp_avg=torch.ones(1).expand(320, 16)),
        lambda s: with_moments(s, exp_avg_sq=None),
        lambda s: with_moments(s, exp_avg_sq=torch.ones(320, 16, 1)),
        lambda s: with_moments(s, other=torch.ones(1)),
        lambda s: s | {"model": {}},
        lambda s: s | {"model": dict(s["model"]) | {"x": torch.ones(1)}},
        lambda s: s | {"data": {}},
        lambda s: with_value(s, ("train_config", "learning_rate"), "x"),
        lambda s: with_value(s, ("train_config", "batch_size"), 0),
        lambda s: with_value(s, ("train_config", "eval_interval"), 0),
        lambda s: with_value(s, ("train_config", "flavour"), 1),
        lambda s: with_value(s, ("train_config", "seed"), -1),
        lambda s: with_value(s, ("train_config", "dataset"), "../mini"),
        lambda s: with_value(s, ("train_config", "tokenizer"), "../byte"),
        lambda s: with_value(s, ("train_config", 5), 1),
        lambda s: with_value(s, ("model_config", "n_head"), 0),
        lambda s: with_value(s, ("model_config", "flavour"), 0),
        lambda s: with_value(s, ("progress", "step"), -1),
        lambda s: with_value(s, ("progress", "flavour"), -1),
        lambda s: with_value(s, ("progress", "best"), None),
        lambda s: with_value(s, ("recipe", "max_iters"), "x"),
        lambda s: with_value(s, ("recipe", "flavour"), torch.ones(2)),
        lambda s: s | {"format": 0},
        lambda s: s | {"format": "2"},
        lambda s: s | {"format": 99},
        lambda s: s | {"format": 1},
    ],
)
def test_invalid_checkpoint_does_not_resume(change, resume_state, corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_checkpoints(change(copy.deepcopy(resume_state)), "latest.pt")
    status = train.main(cli_args(corpus, out_dir="run", max_iters=6, save_interval=3) + ["--resume"])
    assert status == 2, capsys.readouterr().err
    error_line(capsys, status)


def test_unchanged_checkpoint_resumes(resume_state, corpus, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_checkpoints(resume_state, "latest.pt")
    assert train.main(cli_args(corpus, out_dir="run", max_iters=6, save_interval=3) + ["--resume"]) == 0


def test_invalid_latest_checkpoint_falls_back_to_previous(
    resume_state, saved_state, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    values = resume_state["train_config"] | resume_state["model_config"]
    save_checkpoints(with_value(resume_state, ("progress", "step"), "x"), "latest.pt")
    save_checkpoints(resume_state, "previous.pt")
    state = runs.last_state(Path("run"), {k: v for k, v in values.items() if k != "model"})
    assert state["file"] == "previous.pt"
    assert "WARNING: run/latest.pt: progress.step must be" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------------
# Models of Hugging Face


@pytest.fixture(scope="module")
def hf_folder(tmp_path_factory) -> Path:
    """A model in the format of transformers, with its weights in two files."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path_factory.mktemp("hf")
    t = trainer(qk_norm=True)
    hf.to_hf(t.model, t.data.tokenizer, folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    files = {name: f"model-{1 + (name > 'model.l')}.safetensors" for name in tensors}
    for file in set(files.values()):
        save_file({name: x for name, x in tensors.items() if files[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    return folder


@pytest.fixture
def hf_copy(hf_folder, tmp_path) -> Path:
    return Path(shutil.copytree(hf_folder, tmp_path / "theirs"))


JSON_FILES = ["config.json", "tokenizer.json", "model.safetensors.index.json"]


def test_unchanged_hf_model_loads(hf_copy):
    hf.from_hf(hf_copy)


@pytest.mark.parametrize("file", JSON_FILES)
@pytest.mark.parametrize("content", NOT_OBJECTS, ids=lambda content: repr(content[:12]))
def test_hf_file_that_is_not_a_json_object(content, file, hf_copy):
    (hf_copy / file).write_bytes(content)
    assert error_message(lambda: hf.from_hf(hf_copy), file)


@pytest.mark.parametrize("file", JSON_FILES)
def test_junk_values_in_hf_files(file, hf_copy):
    data = json.loads((hf_copy / file).read_text())
    data["model"] = (
        {**data["model"], "vocab": {"a": 1, "b": 2}} if file == JSON_FILES[1] else data.get("model", {})
    )
    for keys in key_paths(data):
        for value in JUNK:
            (hf_copy / file).write_text(json.dumps(with_value(data, keys, value)))
            error_message(
                lambda: hf.from_hf(hf_copy), *JSON_FILES, "has no equivalent", "has shape", "theirs"
            )
        (hf_copy / file).write_text(json.dumps(with_value(data, keys, 0, remove=True)))
        error_message(lambda: hf.from_hf(hf_copy), *JSON_FILES, "has no equivalent", "has shape", "theirs")


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
        (
            JSON_FILES[2],
            dict(weight_map={"x": "../model-1.safetensors"}),
            "weight_map.x must be a plain name",
        ),
        (JSON_FILES[2], dict(weight_map={"x": "model-3.safetensors"}), "model-3.safetensors"),
        (JSON_FILES[2], dict(weight_map={"x": "config.json"}), "config.json: SafetensorError"),
        (JSON_FILES[2], dict(weight_map={}), "has shape [0]"),
        (JSON_FILES[2], dict(weight_map={"x": 3}), "weight_map.x must be a plain name, not 3"),
    ],
    ids=str,
)
def test_invalid_hf_files(file, change, message, hf_copy, tmp_path, monkeypatch, capsys):
    data = json.loads((hf_copy / file).read_text())
    (hf_copy / file).write_text(json.dumps(data | change))
    monkeypatch.chdir(tmp_path)
    assert train.main(["--init_from=hf:theirs", "--dataset=none"]) == 2
    assert message in error_line(capsys, 2)


@pytest.mark.parametrize("size", [0, 1, 8, 100, 3000])
def test_truncated_hf_weights(size, hf_copy):
    os.truncate(hf_copy / "model-2.safetensors", size)
    assert error_message(lambda: hf.from_hf(hf_copy), "model-2.safetensors")


@pytest.mark.parametrize("kind", ["missing", "shape", "0-dim", "2-dim", "empty", "int64", "bool", "complex"])
@pytest.mark.parametrize("name", ["model.norm.weight", "model.embed_tokens.weight"])
def test_hf_weights_that_do_not_match(kind, name, hf_copy):
    from safetensors.torch import load_file, save_file

    for file in hf_copy.glob("*.safetensors"):
        if name in (tensors := load_file(file)):
            tensors.pop(name)
            save_file(
                tensors | ({name: BAD_TENSORS[kind](torch.ones(16))} if BAD_TENSORS[kind] else {}), file
            )
    assert name in error_message(lambda: hf.from_hf(hf_copy), "theirs: ")


# ----------------------------------------------------------------------------------------------------------
# Files that are truncated during a run


def truncate(file: str, size: int) -> None:
    """Truncate a file in keys in the fourth update of this process."""
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
def test_bin_truncated_during_a_run(file, size, mini, tmp_path):
    """Without a check, the process would die from SIGBUS or train on zeros."""
    path = str(mini / file)
    run = Program(cli_args("data", out_dir="run", save_interval=2), tmp_path, hook=(truncate, path, size))
    assert run.wait() == 1, run.text
    errors = [line for line in run.text.splitlines() if "error" in line]
    assert len(errors) == 1 and f"{file} was truncated" in errors[0]
    assert checkpoint.read(tmp_path / "run/latest.pt")["step"] == (2 if file == "train.bin" else 4)


@pytest.mark.skipif(os.name == "nt", reason="Windows does not rename a folder whose files are mapped")
def test_data_replaced_during_a_run(mini):
    """The run continues with the files that it has opened, whatever the size of the new ones."""
    data = datasets.load_data(mini)
    mini.rename("old")
    mini.mkdir()
    (mini / "train.bin").write_bytes(b"")
    shutil.rmtree("old")
    datasets.check_not_truncated(data.train)
    datasets.check_not_truncated(datasets.first_stories(data.train, 256, 2))


@pytest.mark.parametrize("value", [False, None])
def test_error_is_one_line_whatever_the_key(value):
    with pytest.raises(ValueError, match="^file: model. +(must be|is missing)") as raised:
        with schema.naming("file"):
            schema.check({"model": {"\n": value}}, {"model": {"*": schema.WHOLE}})
    assert "\n" not in str(raised.value)
