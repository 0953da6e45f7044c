"""Checkpoints: atomic writes, detection of damage, no code execution, failing disks, earlier formats."""

import errno
import io
import json
import os
import pickle
import random
import shutil
import struct
import time
import zipfile
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from helpers import Program, bit_equal, cli_args, config, metrics, random_data, run_state, trainer

import prepare
import train
from model import GPT
from nanostlm import checkpoint, runs, score, tokenizer
from nanostlm import data as datasets


def state(**changes) -> dict:
    """A minimal valid checkpoint."""
    c = config().model
    torch.manual_seed(0)
    base = {
        "model": GPT(c).state_dict(),
        "model_config": asdict(c),
        "tokenizer": tokenizer.get("byte").state(),
    }
    return base | {"step": 3} | changes


# ----------------------------------------------------------------------------------------------------------
# Save, read, load


def test_save_and_read_roundtrip(tmp_path):
    extra = dict(
        a=[1, 2.5, "three", None, True, {"x": (1, 2)}], weights=torch.arange(5).half(), nan=float("nan")
    )
    checkpoint.save(tmp_path / "x.pt", state(**extra))
    loaded = checkpoint.read(tmp_path / "x.pt")
    assert bit_equal(loaded, {"format": checkpoint.FORMAT, **state(**extra)})
    assert [p.name for p in tmp_path.iterdir()] == ["x.pt"]
    assert zipfile.ZipFile(tmp_path / "x.pt").testzip() is None, "a valid zip for other programs"


def test_every_checkpoint_loads_with_weights_only(main):
    assert main("run", dtype="float16", optimizer="muon") == 0
    for name in ("latest.pt", "previous.pt", "best.pt"):
        state = torch.load(Path("run", name), weights_only=True)
        types = set()

        def collect(x, types=types):
            if isinstance(x, dict | list | tuple):
                for y in [*x.keys(), *x.values()] if isinstance(x, dict) else x:
                    collect(y)
            else:
                types.add(type(x))

        collect(state)
        assert types <= {torch.Tensor, int, float, str, bool, type(None)}, name
        assert not any(key.startswith(("_orig_mod", "module.")) for key in state["model"])
        assert state["provenance"].keys() >= {"torch", "python", "commit", "model.py", "train.py"}
        assert state["train_config"]["dataset"] == "mini" and state["model_config"]["vocab_size"] == 257
    assert run_state("run")["optimizers"] and "optimizers" not in torch.load("run/best.pt")


@pytest.mark.parametrize(
    "changes",
    [
        dict(tied=True),
        dict(tied=False),
        dict(share="layers"),
        dict(share="mlp"),
        dict(share="lora", tied=True),
    ],
    ids=str,
)
def test_tied_and_shared_weights_roundtrip(changes, tmp_path):
    t = trainer(out_dir=tmp_path, **changes)
    t.train_step(0)
    t.save_checkpoint(1)
    model, _ = checkpoint.load(tmp_path / "latest.pt")
    assert len(list(model.parameters())) == len(list(t.model.parameters()))
    assert (model.head.linear.weight is model.embedder.tokens.weight) == t.config.model.tied
    assert bit_equal(dict(model.state_dict()), dict(t.model.state_dict()))
    resumed = trainer(out_dir=tmp_path, **changes)
    resumed.load_checkpoint(checkpoint.read(tmp_path / "latest.pt"))
    for x in (t, resumed):
        x.train_step(1)
    assert bit_equal(dict(resumed.model.state_dict()), dict(t.model.state_dict()))


def test_loaded_model_is_in_eval_mode(tmp_path):
    t = trainer(out_dir=tmp_path, dropout=0.5)
    t.save_checkpoint(0)
    model, tok = checkpoint.load(tmp_path)
    assert not model.training and tok.sha256 == t.data.tokenizer.sha256
    idx = torch.tensor([[1, 2, 3]])
    assert torch.equal(model(idx)[0], model(idx)[0])


def test_find_prefers_best_then_latest_then_previous(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no checkpoint"):
        checkpoint.find(tmp_path)
    for name in ("previous.pt", "latest.pt", "best.pt"):
        checkpoint.save(tmp_path / name, state())
        assert checkpoint.find(tmp_path).name == name
    with pytest.raises(FileNotFoundError, match="there is no checkpoint at"):
        checkpoint.read(tmp_path / "nope.pt")
    with pytest.raises(FileNotFoundError, match="no checkpoint under"):
        checkpoint.newest_run(tmp_path / "nowhere")


# ----------------------------------------------------------------------------------------------------------
# Damage


@pytest.fixture(scope="module")
def checkpoint_file(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("good") / "good.pt"
    checkpoint.save(file, state())
    return file


def test_every_flipped_bit_is_detected(checkpoint_file, tmp_path):
    """60 random flips, then one in each of the first and last bytes, which hold the zip's structure."""
    content, rng, detected = checkpoint_file.read_bytes(), random.Random(0), 0
    bits = [rng.randrange(8 * len(content)) for _ in range(60)]
    bits += [8 * i + rng.randrange(8) for i in [*range(60), *range(len(content) - 150, len(content))]]
    for bit in bits:
        broken = bytearray(content)
        broken[bit // 8] ^= 1 << bit % 8
        file = tmp_path / "broken.pt"
        file.write_bytes(broken)
        with pytest.raises(ValueError, match=r"broken.pt (is damaged|holds more)") as excinfo:
            checkpoint.read(file)
        assert "\n" not in str(excinfo.value)
        detected += 1
    assert detected == 60 + 60 + 150


def test_truncated_file_is_detected(checkpoint_file, tmp_path):
    content = checkpoint_file.read_bytes()
    for size in (0, 1, 10, 63, 64, 65, 1000, len(content) // 2, len(content) - 64, len(content) - 1):
        file = tmp_path / "truncated.pt"
        file.write_bytes(content[:size])
        with pytest.raises(ValueError, match="truncated.pt is damaged"):
            checkpoint.read(file)
    file.write_bytes(content + b"x")
    with pytest.raises(ValueError, match="truncated.pt is damaged"):
        checkpoint.read(file)
    for junk in (b"\x00" * 5000, random.Random(1).randbytes(5000), b"PK\x03\x04" + b"\x80" * 500):
        file.write_bytes(junk)
        with pytest.raises(ValueError, match="truncated.pt is damaged"):
            checkpoint.read(file)


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("executed",)


@pytest.mark.parametrize("how", ["zip", "signed", "legacy", "pickle"])
def test_reading_never_executes_code(how, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "malicious.pt"
    if how == "signed":  # with a valid checksum
        checkpoint.save(file, state(malicious=Malicious()))
    elif how == "pickle":
        file.write_bytes(pickle.dumps({"format": 1, "malicious": Malicious()}))
    else:
        torch.save({"format": 1, "malicious": Malicious()}, file, _use_new_zipfile_serialization=how == "zip")
    with pytest.raises(
        ValueError, match="malicious.pt (holds more than tensors and plain data|is damaged or no)"
    ):
        checkpoint.read(file)
    assert not Path("executed").exists()
    torch.load(file, weights_only=False) if how == "zip" else None
    assert Path("executed").exists() == (how == "zip"), "weights_only=False does execute it"


def test_foreign_and_newer_files_raise(tmp_path):
    torch.save({"model": {}}, tmp_path / "foreign.pt")
    with pytest.raises(ValueError, match="not written by this project"):
        checkpoint.read(tmp_path / "foreign.pt")
    torch.save([1, 2], tmp_path / "foreign.pt")
    with pytest.raises(ValueError, match="not written by this project"):
        checkpoint.read(tmp_path / "foreign.pt")
    checkpoint.save(tmp_path / "new.pt", state(format=checkpoint.FORMAT + 1))
    with pytest.raises(ValueError, match="newer version"):
        checkpoint.read(tmp_path / "new.pt")
    state_dict = state()
    state_dict["model_config"]["flavour"] = "vanilla"
    checkpoint.save(tmp_path / "unknown.pt", state_dict)
    with pytest.raises(ValueError, match="unknown.pt: model_config.flavour must be absent"):
        checkpoint.load(tmp_path / "unknown.pt")


def test_checksum_is_the_zip_comment(checkpoint_file):
    content = checkpoint_file.read_bytes()
    assert (
        struct.unpack("<H", content[-66:-64])[0] == 64
        and zipfile.ZipFile(checkpoint_file).comment == content[-64:]
    )


# ----------------------------------------------------------------------------------------------------------
# Disk failures while saving


def failing(monkeypatch, where: str, error: Exception, times: int = 10**9) -> list[int]:
    """Make the next `times` calls of os.fsync, os.replace, torch.save or open raise `error`."""
    module, name = {
        "fsync": (os, "fsync"),
        "replace": (os, "replace"),
        "save": (torch, "save"),
        "open": (checkpoint, "open"),
    }[where]
    real, calls = getattr(module, name, open), []

    def failing_call(*args, **kwargs):
        calls.append(0)
        if len(calls) <= times:
            raise error
        return real(*args, **kwargs)

    monkeypatch.setattr(module, name, failing_call, raising=False)
    return calls


FAULTS = {
    "disk full": ("fsync", OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))),
    "I/O error": ("fsync", OSError(errno.EIO, os.strerror(errno.EIO))),
    "disk full inside torch": (
        "save",
        RuntimeError("[enforce fail at inline_container.cc:874] . unexpected pos"),
    ),
    "permission lost": ("open", PermissionError(errno.EACCES, os.strerror(errno.EACCES), "latest.pt")),
    "renaming refused": ("replace", PermissionError(errno.EPERM, os.strerror(errno.EPERM))),
}


@pytest.mark.parametrize("name", FAULTS)
def test_failed_save_keeps_the_old_checkpoint(name, tmp_path, monkeypatch):
    where, error = FAULTS[name]
    checkpoint.save(tmp_path / "latest.pt", state(step=1))
    old = (tmp_path / "latest.pt").read_bytes()
    with monkeypatch.context() as patch:
        failing(patch, where, error)
        with pytest.raises(type(error)):
            checkpoint.save(tmp_path / "latest.pt", state(step=2), tmp_path / "previous.pt")
    assert [p.name for p in tmp_path.iterdir()] == ["latest.pt"], "no partial file"
    assert (tmp_path / "latest.pt").read_bytes() == old


def test_failed_second_rename_keeps_a_checkpoint(tmp_path, monkeypatch):
    """The old checkpoint is previous.pt by then, and the run resumes from it."""
    checkpoint.save(tmp_path / "latest.pt", state(step=1))
    real = os.replace

    def second_fails(old, new):
        if Path(new).name == "latest.pt":
            raise OSError(errno.EIO, "I/O error")
        real(old, new)

    monkeypatch.setattr(os, "replace", second_fails)
    with pytest.raises(OSError):
        checkpoint.save(tmp_path / "latest.pt", state(step=2), tmp_path / "previous.pt")
    assert checkpoint.read(tmp_path / "previous.pt")["step"] == 1


@pytest.mark.parametrize("name", FAULTS)
def test_save_is_retried(name, main, monkeypatch):
    """Two failures print two warnings and do not change the run."""
    assert main("straight") == 0
    sleeps, step = [], train.Trainer.train_step
    with monkeypatch.context() as patch:
        patch.setattr(time, "sleep", sleeps.append)

        def fail_at_5(self, n):
            if n == 4:
                failing(patch, *FAULTS[name], times=2)
            return step(self, n)

        patch.setattr(train.Trainer, "train_step", fail_at_5)
        assert main("run") == 0
    assert main.stderr.count("WARNING: could not save") == main.stderr.count("trying again") == 2
    assert [seconds for seconds in sleeps if seconds >= 1] == [1, 5]
    assert metrics("run") == metrics("straight") and bit_equal(run_state("run"), run_state("straight"))


@pytest.mark.parametrize("file", ["latest.pt", "best.pt"])
@pytest.mark.parametrize("name", FAULTS)
def test_repeated_save_failures_end_the_run_with_status_1(name, file, main, monkeypatch):
    where, error = FAULTS[name]
    step, first_failure = train.Trainer.train_step, {"latest.pt": 14, "best.pt": 11}[file]
    with monkeypatch.context() as patch:
        patch.setattr(time, "sleep", lambda seconds: None)

        def fail_from(self, n):
            if n == first_failure:
                failing(patch, where, error)
            return step(self, n)

        patch.setattr(train.Trainer, "train_step", fail_from)
        assert main("run", save_interval=5) == 1
    assert main.stderr.count(f"WARNING: could not save {file}") == 3
    assert "error: run cannot be written to" in main.stderr and "Traceback" not in main.stderr
    assert run_state("run")["step"] == 10
    assert checkpoint.read("run/best.pt")["step"] == (6 if file == "best.pt" else 12)
    assert not list(Path("run").glob("*.tmp"))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs POSIX resource limits")
def test_real_write_limit(tmp_path, corpus):
    """With RLIMIT_FSIZE at 60 kB, best.pt fits and latest.pt does not."""
    run = Program(cli_args(corpus, out_dir="run"), tmp_path, hook=(limit_files, 60_000))
    assert run.wait() == 1
    assert run.text.count("WARNING: could not save latest.pt") == 3 and "Traceback" not in run.text
    assert not list((tmp_path / "run").glob("*.tmp"))
    assert Program(cli_args(corpus, out_dir="run") + ["--resume"], tmp_path).wait() == 0


def limit_files(size: int) -> None:
    import resource
    import signal

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # so that writing fails instead
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    time.sleep = lambda seconds: None


def full_disk(monkeypatch, steps: range) -> None:
    """At these steps only half of each line reaches metrics.jsonl, and the write fails."""
    step, current = train.Trainer.train_step, [0]

    class Full(io.TextIOWrapper):
        def write(self, text):
            if current[0] in steps:
                super().write(text[: len(text) // 2])
                self.flush()
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return super().write(text)

    def count_steps(self, n):
        current[0] = n + 1
        return step(self, n)

    monkeypatch.setattr(train.Trainer, "train_step", count_steps)
    monkeypatch.setattr(runs, "open", lambda f, m, encoding: Full(open(f, m + "b"), encoding), raising=False)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)


def test_failed_metrics_lines_are_written_later(main, monkeypatch):
    assert main("straight") == 0
    with monkeypatch.context() as patch:
        full_disk(patch, range(7, 10))
        assert main("run") == 0
    warning = "WARNING: could not write metrics.jsonl at step 8: [Errno 28] No space left on device"
    assert warning in main.stderr and main.stderr.count("WARNING") == 1
    assert metrics("run") == metrics("straight") and bit_equal(run_state("run"), run_state("straight"))


def test_checkpoint_is_not_saved_before_its_metrics(main, monkeypatch):
    with monkeypatch.context() as patch:
        full_disk(patch, range(7, 100))
        assert main("run") == 1
    assert main.stderr.count("WARNING: could not save latest.pt at step 10") == 3
    assert "error: run cannot be written to" in main.stderr and "Traceback" not in main.stderr
    assert run_state("run")["step"] == 5 and metrics("run")[-1]["step"] == 6, "no partial line"
    assert main("run", "--resume") == 0 and "at step 5" in main.stderr
    assert main("straight") == 0 and metrics("run") == metrics("straight")


def test_metrics_are_synced_before_each_checkpoint(main, monkeypatch):
    """Before a checkpoint is renamed to its final name, the lines of metrics.jsonl up to it are on disk."""
    synced, checked, fsync, replace = {}, [], os.fsync, os.replace

    def record_fsync(handle):
        fsync(handle)
        synced[os.fstat(handle).st_ino] = os.fstat(handle).st_size

    def check_replace(old, new):
        if Path(new).name in ("latest.pt", "metrics.jsonl"):
            stat = Path(old if Path(new).suffix == ".jsonl" else "run/metrics.jsonl").stat()
            assert synced.get(stat.st_ino) == stat.st_size
            checked.append(Path(new).name)
        replace(old, new)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "replace", check_replace)
    assert main("run", stop_after=12) == 143 and main("run", "--resume") == 0
    assert checked.count("metrics.jsonl") == 2 and checked.count("latest.pt") == 6


def test_incomplete_metrics_line_is_removed(main):
    assert main("straight") == 0
    assert main("run", stop_after=10) == 143
    with open("run/metrics.jsonl", "a") as file:
        file.write('{"step": 11, "split": "train", "loss": 3.1, "tok')
    assert main("run", "--resume") == 0
    assert metrics("run") == metrics("straight")


def test_damaged_latest_never_replaces_previous(main):
    assert main("run", stop_after=18) == 143
    os.truncate("run/latest.pt", 5000)
    assert main("run", "--resume", stop_after=17) == 143 and "at step 15" in main.stderr
    assert checkpoint.read("run/latest.pt")["step"] == 17 and checkpoint.read("run/previous.pt")["step"] == 15


def test_leftover_temporary_files_are_removed(main):
    assert main("run", stop_after=10) == 143
    shutil.copy("run/latest.pt", "run/latest.pt.99999.tmp")
    assert main("run", "--resume") == 0
    assert not list(Path("run").glob("*.tmp"))


def test_fingerprint_distinguishes_data():
    def fingerprint(data):
        return runs.fingerprint(data.train, data.val)

    data, other_data = random_data(), random_data(seed=1)
    assert fingerprint(data) == fingerprint(random_data()) != fingerprint(other_data)
    assert fingerprint(data) != fingerprint(data._replace(val=data.val[:-1]))


# ----------------------------------------------------------------------------------------------------------
# A checkpoint of an earlier version


OLD = Path(__file__).parent / "checkpoint_f6ca03e"  # written by commit f6ca03e, with its results


@pytest.fixture
def earlier(tmp_path, monkeypatch) -> dict:
    """The run of that version in ./run, with its data prepared again; returns the results it had then."""
    monkeypatch.chdir(tmp_path)
    prepare.prepare("mini", "byte", source=str(OLD / "stories.txt"))
    Path("run").mkdir()
    for name in ("latest.pt", "metrics.jsonl"):
        shutil.copy(OLD / name, "run")
    return json.loads((OLD / "expected.json").read_text())


def test_earlier_format_scores_the_same(earlier):
    model, tok = checkpoint.load("run")
    assert model.config.separator == tok.eot, "document masking was a setting of the training"
    data = datasets.load_data("data/mini/byte")
    nats, count = score.total(model, [data.val], tok.eot, rows=4)
    assert count == earlier["val_tokens"] and nats == pytest.approx(earlier["val_nats"], rel=1e-6)
    ids = tok.encode("Once upon a time, there was a little girl.")
    logprob = score.loglikelihood(model, [tok.eot], ids)
    assert logprob == pytest.approx(earlier["loglikelihood"], rel=1e-6)


def test_earlier_format_resumes(earlier, capsys):
    assert train.main(["--out_dir=run", "--resume", "--max_iters=12"]) == 0, capsys.readouterr().err
    resumed = [line for line in metrics("run") if line["step"] > 6]
    expected = [(line["step"], line["split"]) for line in earlier["resumed"]]
    assert [(line["step"], line["split"]) for line in resumed] == expected
    losses = [line["loss"] for line in earlier["resumed"]]
    assert [line["loss"] for line in resumed] == pytest.approx(losses, rel=1e-5)


def test_earlier_format_progress_and_separator_are_upgraded():
    """The separator is end-of-text, the last id of the tokenizer."""
    tok = tokenizer.Tokenizer("bpe258", [bytes([b]) for b in range(256)] + [b"ab"])
    progress = dict(step=7, best=1.5, evaluated=6, skipped=2, elapsed=3.25)
    old = state(format=1, tokenizer=tok.state(), optimizers=[], waited=4, **progress)
    del old["model_config"]["separator"]
    for cross_stories, separator in ((False, tok.eot), (True, -1)):
        upgraded = checkpoint.upgrade(old | {"train_config": {"cross_stories": cross_stories}})
        assert upgraded["model_config"]["separator"] == separator and upgraded["format"] == checkpoint.FORMAT
        assert runs.Progress(**upgraded["progress"]) == runs.Progress(**progress, evals_since_best=4)


def test_earlier_format_with_ema_loads_but_does_not_resume(earlier, capsys):
    state = torch.load("run/latest.pt", weights_only=True)
    state["train_config"]["ema"] = 0.9
    checkpoint.save("run/latest.pt", state | {"format": 1})
    model, _ = checkpoint.load("run")
    assert model.config.n_embd == 4
    assert train.main(["--out_dir=run", "--resume", "--max_iters=12"]) == 2
    assert "--init_from=run" in capsys.readouterr().err
