"""
Bounds: numbers out of range, models that exceed memory, paths of the wrong kind. Each is a one-line error
with exit status 2, before anything is allocated, read or written.
"""

import errno
import io
import json
import math
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, fields, replace
from pathlib import Path

import pytest
import torch
from helpers import ROOT, cli_args, config

import evaluate
import export
import model as models
import prepare
import sample
import train
from model import GPT, GPTConfig
from nanostlm import checkpoint, entry, machine, report, tokenizer
from nanostlm.formats import hf
from train import TrainConfig

MAINS = {module.__name__: module.main for module in (train, prepare, sample, evaluate, export)}
HUGE = [2**31, 10**12, 2**63, 10**30, 10**308, 10**400]
NOT_FINITE = [math.nan, math.inf, -math.inf]


def error_line(status: int, err: str, expected: int = 2) -> str:
    """Check that a program ended with the expected status and one short error line, and return that line."""
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert status == expected and len(errors) == 1 and "Traceback" not in err, (status, err)
    assert err.splitlines()[-1] == errors[0] and len(errors[0]) < 1100
    return errors[0]


# ----------------------------------------------------------------------------------------------------------
# Settings: ranges of numbers, types


def number_fields(cls) -> list:
    return [field for field in fields(cls) if type(field.default) in (int, float)]


NUMBERS = [(cls, field) for cls in (TrainConfig, GPTConfig) for field in number_fields(cls)]


@pytest.mark.parametrize("cls, field", NUMBERS, ids=lambda x: getattr(x, "name", ""))
def test_out_of_range_setting_raises_with_its_name(cls, field):
    ranges = (train if cls is TrainConfig else models).RANGES
    low, high = ranges.get(field.name, (0, 10**9))
    assert low <= field.default <= high
    under = low - 1 if type(field.default) is int else math.nextafter(low, -math.inf)
    over = high + 1 if type(field.default) is int else math.nextafter(high, math.inf)
    huge = [n for n in HUGE if n > high]
    for value in (under, over, -1e300, -(10**400), *NOT_FINITE, *huge):
        with pytest.raises(ValueError, match=field.name) as excinfo:
            config(**{field.name: value}).validate()
        assert "\n" not in str(excinfo.value) and len(str(excinfo.value)) < 200
    for value in (low, high):  # valid by themselves, without the checks of several settings
        models.check_settings(replace(cls(), **{field.name: type(field.default)(value)}), ranges, {})


@pytest.mark.parametrize("cls", [TrainConfig, GPTConfig])
def test_setting_of_wrong_type_raises_with_its_name(cls):
    count = 0
    for field in fields(cls):
        if field.name == "model":
            continue
        kind = type(field.default)
        for value in (None, "x", 1, 1.5, True, b"x", [1], {}, (), 1j, object(), int):
            if type(value) is kind or kind is float and type(value) is int:
                continue
            with pytest.raises(ValueError, match=f"^{field.name} must be of type {kind.__name__}"):
                config(**{field.name: value}).validate()
            count += 1
    assert count > 300


def test_default_range_applies_to_other_numbers():
    @dataclass
    class Config:
        alpha: float = 0.5
        beta: int = 3

    models.check_settings(Config(10**9, 0), {}, {})
    for invalid in (Config(alpha=-0.5), Config(alpha=math.nan), Config(beta=10**9 + 1), Config(beta=1.0)):
        with pytest.raises(ValueError, match="alpha|beta"):
            models.check_settings(invalid, {}, {})


POINTS = """0:nan|0:inf|nan:1|inf:1|0:0.5, nan:1|0:0.5, inf:1|0:0.5, 1e400:1|-1:0, 1:1|0:1e-320|0:0.5, 1e308:1
|::|,|0:|:0|0:1:2|0:0x1|٣:x|\0|0:-0.1|0:1, 0:1|1:1, 0:1""".split("|")


@pytest.mark.parametrize("text", POINTS)
@pytest.mark.parametrize("name", ["dropout_schedule", "context_schedule"])
def test_invalid_schedule_raises(name, text):
    try:
        config(**{name: text}).validate()
    except ValueError as error:
        assert name in str(error) and "\n" not in str(error)
    else:
        assert name == "dropout_schedule" and text == "0:1e-320"


SETTING_VALUES = {  # --setting=value for train.py -> part of the error message; "": it prints a plan
    ("n_embd", "1e30"): "n_embd must be between 1 and 1,000,000,000",
    ("n_embd", "1e400"): "n_embd must be a whole number",
    ("n_embd", "9" * 5000): "n_embd must be a whole number",
    ("n_layer", "inf"): "n_layer must be a whole number",
    ("n_layer", "nan"): "n_layer must be a whole number",
    ("n_layer", "1000000000"): "",
    ("n_layer", "1e6"): "",
    ("n_embd", "1000000000"): "",
    ("n_head", "1000000000"): "n_head=1000000000 does not divide",
    ("block_size", "1000000000"): "",
    ("batch_size", "1e12"): "batch_size must be between 1 and",
    ("batch_size", "1e9"): "",
    ("gradient_accumulation_steps", "1e9"): "",
    ("mlp_ratio", "1e9"): "",
    ("mlp_hidden", "1e9"): "",
    ("window", "1e9"): "",
    ("threads", "100000"): "threads must be between 0 and 512",
    ("threads", "-1"): "threads must be",
    ("seed", "9223372036854775808"): "seed must be",
    ("learning_rate", "1e39"): "learning_rate must be",
    ("learning_rate", "1e308"): "learning_rate must be",
    ("learning_rate", "nan"): "learning_rate must be a number",
    ("learning_rate", "1e-320"): "learning_rate must be",
    ("muon_lr", "1e39"): "muon_lr must be",
    ("embedding_lr", "1e39"): "embedding_lr must be",
    ("head_lr", "inf"): "head_lr must be a number",
    ("min_lr", "1e39"): "min_lr must be",
    ("beta1", "1"): "beta1 must be between 0 and 0.999999",
    ("beta2", "1e300"): "beta2 must be",
    ("weight_decay", "1e39"): "weight_decay must be",
    ("grad_clip", "inf"): "grad_clip must be a number",
    ("rope_theta", "0"): "rope_theta must be",
    ("norm_eps", "1e39"): "norm_eps must be",
    ("softcap", "1e39"): "softcap must be",
    ("tokenizer", "bpe10000000000"): "N from 257 to 1,000,000",
    ("tokenizer", "bpe" + "9" * 5000): "File name too long",
    ("tokenizer", "bpe٤٠٩٦"): "no tokenizer is called",
    ("stories", "1e30"): "stories must be",
    ("max_iters", "1e30"): "max_iters must be",
    ("device", "cuda:99999999999999999999"): "device must be",
    ("device", "cuda:" + "9" * 5000): "device must be",
    ("device", "cuda:-1"): "device must be",
    ("device", "cuda:01"): "device must be",
    ("device", "cuda:٣"): "device must be",
    ("device", "cuda:300"): "device must be",
    ("device", ""): "device must be",
    ("device", "cpu:0"): "device must be",
    ("device", "cpu\n"): "device must be",
}


@pytest.mark.parametrize("name, value", SETTING_VALUES, ids=lambda text: ascii(text)[:30])
def test_setting_gives_a_plan_or_one_error_line(name, value, main):
    start = time.perf_counter()
    status = main("", **{"max_iters": 0, name: value})
    if SETTING_VALUES[name, value]:
        assert SETTING_VALUES[name, value] in error_line(status, main.stderr)
    else:
        assert status == 0 and "MB of memory" in main.stderr
    assert time.perf_counter() - start < 2 and not Path("out").exists()


# ----------------------------------------------------------------------------------------------------------
# Sizes: computed from the configuration before any allocation


@pytest.fixture
def small_machine(monkeypatch):
    """A machine with 1,000 MB of memory. Constructing a model fails the test."""
    monkeypatch.setattr(machine, "total_memory", lambda device: 1000 * 2**20)
    monkeypatch.setattr(report, "total_memory", lambda device: 1000 * 2**20)

    def init(*args, **kwargs):
        raise AssertionError("a model was constructed")

    monkeypatch.setattr(models.Core, "__init__", init)


@pytest.fixture
def run_folder(main, tmp_path_factory, corpus):
    """A current directory with a run in out/run, which is trained only once."""
    cached = tmp_path_factory.getbasetemp() / "a-run"
    if not cached.exists():
        assert main("out/run", max_iters=2) == 0
        shutil.copytree("out", cached)
    shutil.copytree(cached, "out", dirs_exist_ok=True)


TOO_LARGE = [
    dict(n_layer=10**9),
    dict(n_layer=10_001, n_embd=2, n_head=1),
    dict(n_layer=10_001, share="layers"),
    dict(n_layer=9_000, n_embd=512, share="layers"),  # fits only after the layers are shared
    dict(n_layer=9_000, n_embd=512, share="lora"),
    dict(n_embd=10**6),
    dict(n_embd=10**9, n_head=1),
    dict(n_embd=2048, n_layer=20),
    dict(mlp_hidden=10**9),
    dict(mlp_ratio=1e9),
    dict(position="learned", block_size=10**8),
    dict(position="shaw", shaw_clip=10**9),
    dict(share="lora", lora_rank=10**9),
    dict(bias=True, n_embd=2**15),
]


@pytest.mark.parametrize("shape", TOO_LARGE, ids=str)
def test_model_that_exceeds_memory_is_an_error(shape, small_machine, main, corpus):
    start = time.perf_counter()
    line = error_line(main("run", **shape), main.stderr)
    assert "and cpu has 1,000 MB" in line or "10,000 layers take too long" in line, line
    assert main("run", max_iters=0, **shape) == 0, "the plan is printed for any size"
    assert "parameters" in main.stderr and time.perf_counter() - start < 5 and not Path("run").exists()


@pytest.mark.parametrize(
    "rows", [dict(batch_size=10**8), dict(gradient_accumulation_steps=10**8), dict(batch_size=10**9)], ids=str
)
def test_batch_that_exceeds_memory_is_an_error(rows, small_machine, main):
    assert "this takes at least" in error_line(main("run", **rows), main.stderr)
    assert main("", max_iters=0, **rows) == 0
    assert "WARNING: this machine has only 1,000 MB of memory" in main.stderr or "accumulation" in str(rows)


def test_run_that_may_exceed_memory_warns(main, monkeypatch):
    for module in (machine, report):
        monkeypatch.setattr(module, "total_memory", lambda device: 100 * 2**20)  # PyTorch alone takes more
    monkeypatch.setattr(machine.Machine, "run_memory", lambda self, c: 101 * 2**20)
    assert (
        main("run", max_iters=2) == 0 and "; WARNING: this machine has only 100 MB of memory" in main.stderr
    )
    monkeypatch.setattr(machine.Machine, "run_memory", lambda self, c: 99 * 2**20)
    assert main("more", max_iters=2) == 0 and "WARNING" not in main.stderr


def test_check_size_accepts_100m_parameters():
    """It raises only for models that certainly do not fit."""
    c = GPTConfig(n_layer=12, n_head=12, n_embd=768, block_size=512, vocab_size=8192)
    machine.check_memory(c)
    assert machine.total_memory(torch.device("cpu")) > 2**28


def edited_checkpoint(path: str, **changes) -> str:
    """Save a copy of a checkpoint with a changed model configuration."""
    state = checkpoint.read(path)
    checkpoint.save("edited_checkpoint.pt", state | {"model_config": state["model_config"] | changes})
    return "edited_checkpoint.pt"


@pytest.mark.parametrize("shape", TOO_LARGE, ids=str)
def test_checkpoint_config_that_exceeds_memory_is_an_error(shape, run_folder, small_machine, capsys):
    path = edited_checkpoint("out/run/best.pt", **{"n_head": 1, "n_embd": 16} | shape)
    for main, argv in ((sample.main, [path]), (evaluate.main, [path]), (export.main, ["--to=hf", "x", path])):
        line = error_line(main(argv), capsys.readouterr().err)
        assert "cpu has 1,000 MB" in line or "too long to construct" in line, line


@pytest.mark.parametrize(
    "name, value", [("n_layer", 2**40), ("n_layer", 10**30), ("n_head", 0), ("dropout", 2), ("n_embd", 17)]
)
def test_checkpoint_with_invalid_config_is_an_error(name, value, run_folder, capsys):
    assert name in error_line(
        sample.main([edited_checkpoint("out/run/best.pt", **{name: value})]), capsys.readouterr().err
    )


def test_from_hf_raises_for_config_that_exceeds_memory(tmp_path, monkeypatch):
    tok = tokenizer.get("byte")
    hf.to_hf(GPT(GPTConfig(n_layer=1, n_head=1, n_embd=16, vocab_size=257, block_size=8)), tok, tmp_path)
    monkeypatch.setattr(models.Core, "__init__", None)
    original = json.loads((tmp_path / "config.json").read_text())
    for change in (
        {"num_hidden_layers": 10**9},
        {"num_hidden_layers": 10_001},
        {"intermediate_size": 10**9},
        {"num_hidden_layers": 10**30},
        {"hidden_size": 2**40, "head_dim": 2**40},
        {"max_position_embeddings": 10**400},
    ):
        (tmp_path / "config.json").write_text(json.dumps(original | change))
        with pytest.raises(ValueError, match="MB|must be|too long to construct"):
            hf.from_hf(tmp_path)


def test_max_layers_are_constructed_within_a_minute():
    start = time.perf_counter()
    GPT(GPTConfig(n_layer=500, n_head=1, n_embd=2, vocab_size=2, mlp="gelu"))
    assert (time.perf_counter() - start) * machine.MAX_LAYERS / 500 < 60


def test_total_memory_respects_the_cgroup_limit(monkeypatch):
    for name in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        for text in ("12345\n", "max\n", ""):
            files = {name: text}

            def fake(path, files=files):
                return io.StringIO(files.get(path, "max"))

            monkeypatch.setattr(machine, "open", fake, raising=False)
            assert (machine.total_memory(torch.device("cpu")) == 12345) is (text == "12345\n")


SCRIPT_OPTIONS = {  # command line -> part of the error message
    ("sample", "--num_samples", "1000000000000"): "num_samples must be between 1 and 100,000",
    ("sample", "--num_samples", "9" * 5000): "num_samples",
    ("sample", "--num_samples", "1e3"): "num_samples",
    ("sample", "--max_new_tokens", "1000000000000"): "max_new_tokens must be between 1 and 1,000,000",
    ("sample", "--max_new_tokens", "0"): "max_new_tokens must be",
    ("sample", "--device", "cuda:99999999999999999999"): "device must be",
    ("evaluate", "--rows", "1000000000000"): "rows must be between 1 and 4,096",
    ("evaluate", "--rows", "-1"): "rows must be",
    ("evaluate", "--device", "cuda:99999999999999999999"): "device must be",
    ("prepare", "toystories", "--stories", "0"): "stories must be between 1 and",
    ("prepare", "toystories", "--stories", "-5"): "stories must be",
    ("prepare", "toystories", "--stories", "1" + "0" * 30): "stories must be",
    ("prepare", "toystories", "--stories", "many"): "--stories",
    ("prepare", "toystories", "--workers", "0"): "workers must be between 1 and 1,024",
    ("prepare", "toystories", "--workers", "-1"): "workers must be",
    ("prepare", "toystories", "--workers", "1000000000"): "workers must be",
    ("prepare", "toystories", "--tokenizer", "bpe10000000000"): "N from 257 to 1,000,000",
    ("prepare", "toystories", "--tokenizer", "bpe256"): "N from 257",
    ("prepare", "toystories", "--tokenizer", "bpe-1"): "no tokenizer is called",
}


@pytest.mark.parametrize("argv", SCRIPT_OPTIONS, ids=lambda argv: " ".join(argv)[:50])
def test_out_of_range_script_options(argv, main, capsys):
    if argv[0] in ("sample", "evaluate"):
        assert main("out/run", max_iters=2) == 0
    status = MAINS[argv[0]](list(argv[1:]))
    assert SCRIPT_OPTIONS[argv] in error_line(status, capsys.readouterr().err)
    assert not Path("data").exists()


def test_kv_cache_that_exceeds_memory_is_an_error(main, capsys, monkeypatch):
    assert main("run", max_iters=2) == 0
    monkeypatch.setattr(machine, "total_memory", lambda device: 100 * 2**20)
    status = sample.main(["--out_dir", "run", "--num_samples", "100000", "--max_new_tokens", "1"])
    assert "cpu has 100 MB" in error_line(status, capsys.readouterr().err)


# ----------------------------------------------------------------------------------------------------------
# Paths of the wrong kind


ALL = ("device", "null", "full", "inside", "inside a device", "empty", "nul", "long", "deep", "loop", "fifo")
FILES, FOLDERS = (*ALL, "folder"), (*ALL, "file")


def bad_path(kind: str) -> str:
    """A path of this kind, created in the current directory if necessary."""
    Path("file.txt").write_text("Once upon a time\n\nTom and Mia\n\nThe end\n")
    Path("folder").mkdir(exist_ok=True)
    if not os.path.lexists("loop"):
        os.symlink("loop", "loop")
        os.mkfifo("fifo")
    paths = {"device": "/dev/zero", "null": "/dev/null", "full": "/dev/full", "inside": "file.txt/y"}
    paths |= {
        "inside a device": "/dev/null/x",
        "empty": "",
        "nul": "a\0b",
        "long": "n" * 5000,
        "deep": "n/" * 5000,
    }
    return ({"file": "file.txt"} | paths).get(kind, kind)


COMMANDS = {  # script and arguments with PATH -> the kinds of path that are errors there
    ("train", "--out_dir=PATH"): tuple(kind for kind in FOLDERS if kind != "empty"),
    ("train", "--out_dir=PATH", "--overwrite"): tuple(kind for kind in FOLDERS if kind != "empty"),
    ("train", "--out_dir=PATH", "--resume"): tuple(kind for kind in FOLDERS if kind != "empty"),
    ("train", "--data_dir=PATH"): FOLDERS,
    ("train", "--dataset=mine", "--source=PATH"): ALL,
    ("train", "--init_from=PATH"): tuple(kind for kind in (*ALL, "file", "folder") if kind != "empty"),
    ("train", "--init_from=hf:PATH"): FOLDERS,
    ("train", "PATH"): FILES,
    ("prepare", "mine", "--source", "PATH"): (*ALL, "folder"),
    ("prepare", "toystories", "--stories", "9", "--tokenizer", "byte", "--data_dir", "PATH"): FOLDERS,
    ("prepare", "PATH", "--source", "file.txt"): ALL[:-2],
    ("prepare", "toystories", "--tokenizer", "PATH"): FILES,
    ("sample", "--prompt", "FILE:PATH"): FILES,
    ("sample", "--out_dir", "PATH"): (*ALL, "file", "folder"),
    ("evaluate", "PATH"): (*ALL, "file", "folder"),
    ("evaluate", "--out_dir", "PATH"): (*ALL, "file", "folder"),
    ("evaluate", "--data", "PATH"): (*FOLDERS, "folder"),
    ("evaluate", "--plot", "PATH"): FILES,
    ("export", "--to", "hf", "PATH"): FOLDERS,
    ("export", "--to", "hf", "PATH", "--overwrite"): FOLDERS,
    ("export", "--to", "llama2c", "PATH", "--overwrite"): FILES,
    ("export", "--to", "hf", "dest", "--out_dir", "PATH"): (*ALL, "file", "folder"),
}
BAD_PATHS = [(argv, kind) for argv, kinds in COMMANDS.items() for kind in kinds]


@pytest.mark.skipif(os.name != "posix", reason="devices and pipes of POSIX")
@pytest.mark.parametrize("argv, kind", BAD_PATHS, ids=lambda x: x if isinstance(x, str) else " ".join(x))
def test_path_of_wrong_kind_is_an_error(argv, kind, run_folder, corpus, capsys, monkeypatch):
    path = bad_path(kind)
    if argv[0] == "train":
        monkeypatch.setattr(train, "Trainer", None)  # training must not start
    args = [arg.replace("PATH", path) for arg in argv[1:]]
    if argv[0] == "train":
        args += [arg for arg in cli_args(corpus, max_iters=1) if arg.split("=")[0] not in str(argv)]
    before = sorted(str(p) for p in Path(".").rglob("*"))
    status = MAINS[argv[0]](args)
    error_line(status, capsys.readouterr().err)
    after = sorted(str(p) for p in Path(".").rglob("*") if p.name not in ("data", "n") and p.parts[0] != "n")
    assert after == before
    assert not Path("/dev/tokenizer.bin").exists()


@pytest.mark.skipif(os.name != "posix" or os.getuid() == 0, reason="root has all permissions")
@pytest.mark.parametrize("argv", COMMANDS, ids=" ".join)
def test_folder_without_permissions_is_an_error(argv, run_folder, corpus, capsys):
    Path("locked").mkdir()
    os.chmod("locked", 0)
    defaults = cli_args(corpus, max_iters=1) if argv[0] == "train" else []
    defaults = [arg for arg in defaults if arg.split("=")[0] not in str(argv)]
    try:
        status = MAINS[argv[0]]([arg.replace("PATH", "locked/x") for arg in argv[1:]] + defaults)
        error_line(status, capsys.readouterr().err)
    finally:
        os.chmod("locked", 0o700)


def test_prompt_size_is_limited(run_folder, capsys, monkeypatch):
    monkeypatch.setattr(sample, "MAX_PROMPT", 100)
    Path("long.txt").write_text("a" * 101)
    Path("fits.txt").write_text("a" * 99 + "\n")
    assert "more than 100 bytes" in error_line(
        sample.main(["--prompt", "FILE:long.txt"]), capsys.readouterr().err
    )
    assert sample.read_prompt("FILE:fits.txt") == "a" * 99
    with open("/dev/zero") as zero:
        monkeypatch.setattr(sys, "stdin", zero)
        assert "more than 100 bytes" in error_line(sample.main(["--prompt", "-"]), capsys.readouterr().err)


def test_prepare_ignores_non_regular_files_in_a_folder(tmp_path, capsys):
    texts = tmp_path / "texts"
    texts.mkdir()
    for i in range(20):
        (texts / f"{i}.txt").write_text(f"story {i}")
    os.mkfifo(texts / "pipe.txt")
    (texts / "folder.txt").mkdir()
    (texts / "zero.txt").symlink_to("/dev/zero")
    folder = prepare.prepare("mine", "byte", source=str(texts), data_dir=tmp_path / "data")
    meta = json.loads((folder / "meta.json").read_text())
    assert meta["train"]["stories"] + meta["val"]["stories"] == 20


ERRNO_STATUS = dict.fromkeys("ENOENT EEXIST EISDIR ENOTDIR EACCES EPERM EROFS ENAMETOOLONG ELOOP".split(), 2)
ERRNO_STATUS |= dict.fromkeys("ENOSPC EIO EDQUOT ENOMEM EMFILE ENFILE ECONNREFUSED ETIMEDOUT".split(), 1)
ERRORS = [
    *((OSError(getattr(errno, name), name, "n" * 5000), status) for name, status in ERRNO_STATUS.items()),
    *(
        (error, 2)
        for error in (ValueError("x"), FileNotFoundError("x"), UnicodeDecodeError("x", b"", 0, 1, "x"))
    ),
    *((error, 1) for error in (OSError("x"), RuntimeError("x"), MemoryError(), ConnectionError("x"))),
]


@pytest.mark.parametrize("error, status", ERRORS, ids=lambda x: str(x)[:40])
def test_exit_status_depends_on_errno(error, status, capsys):
    @entry.script
    def main(argv):
        raise error

    error_line(main([]), capsys.readouterr().err, status)


@pytest.mark.skipif(os.name != "posix", reason="devices of POSIX")
def test_endless_prompt_file_in_a_subprocess(run_folder):
    """As a user runs it."""
    command = [sys.executable, str(ROOT / "sample.py"), "--prompt", "FILE:/dev/zero"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    error_line(done.returncode, done.stderr)
