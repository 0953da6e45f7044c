"""Checkpoints: whole or not at all, found out when damaged, never executed, kept when the disk fails."""

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


def state(**more) -> dict:
    """The smallest whole checkpoint."""
    c = config().model
    torch.manual_seed(0)
    made = {
        "model": GPT(c).state_dict(),
        "model_config": asdict(c),
        "tokenizer": tokenizer.get("byte").state(),
    }
    return made | {"step": 3} | more


# ----------------------------------------------------------------------------------------------------------
# Save, read, load


def test_what_was_saved_comes_back(tmp_path):
    plain = dict(
        a=[1, 2.5, "three", None, True, {"x": (1, 2)}], weights=torch.arange(5).half(), nan=float("nan")
    )
    checkpoint.save(tmp_path / "x.pt", state(**plain))
    back = checkpoint.read(tmp_path / "x.pt")
    assert bit_equal(back, {"format": checkpoint.FORMAT, **state(**plain)})
    assert [p.name for p in tmp_path.iterdir()] == ["x.pt"]
    assert zipfile.ZipFile(tmp_path / "x.pt").testzip() is None, "other programs open it, too"


def test_torch_opens_every_checkpoint_of_a_run_with_weights_only(main):
    assert main("run", dtype="float16", optimizer="muon") == 0
    for name in ("latest.pt", "previous.pt", "best.pt"):
        found = torch.load(Path("run", name), weights_only=True)
        kinds = set()

        def look(x, kinds=kinds):
            if isinstance(x, dict | list | tuple):
                for y in [*x.keys(), *x.values()] if isinstance(x, dict) else x:
                    look(y)
            else:
                kinds.add(type(x))

        look(found)
        assert kinds <= {torch.Tensor, int, float, str, bool, type(None)}, name
        assert not any(key.startswith(("_orig_mod", "module.")) for key in found["model"])
        assert found["provenance"].keys() >= {"torch", "python", "commit", "model.py", "train.py"}
        assert found["train_config"]["dataset"] == "mini" and found["model_config"]["vocab_size"] == 257
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
def test_tied_and_shared_weights_survive(changes, tmp_path):
    t = trainer(out_dir=tmp_path, **changes)
    t.train_step(0)
    t.save_checkpoint(1)
    model, _ = checkpoint.load(tmp_path / "latest.pt")
    assert len(list(model.parameters())) == len(list(t.model.parameters()))
    assert (model.head.linear.weight is model.embedder.tokens.weight) == t.config.model.tied
    assert bit_equal(dict(model.state_dict()), dict(t.model.state_dict()))
    again = trainer(out_dir=tmp_path, **changes)
    again.load_checkpoint(checkpoint.read(tmp_path / "latest.pt"))
    for x in (t, again):
        x.train_step(1)
    assert bit_equal(dict(again.model.state_dict()), dict(t.model.state_dict()))


def test_a_loaded_model_does_not_drop_out(tmp_path):
    t = trainer(out_dir=tmp_path, dropout=0.5)
    t.save_checkpoint(0)
    model, tok = checkpoint.load(tmp_path)
    assert not model.training and tok.sha256 == t.data.tokenizer.sha256
    idx = torch.tensor([[1, 2, 3]])
    assert torch.equal(model(idx)[0], model(idx)[0])


def test_which_checkpoint_a_folder_stands_for(tmp_path):
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
def good(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("good") / "good.pt"
    checkpoint.save(file, state())
    return file


def test_every_flipped_bit_is_found(good, tmp_path):
    """60 random flips, then one in each of the first and last bytes, where the zip's structure stands."""
    whole, draw, found = good.read_bytes(), random.Random(0), 0
    places = [draw.randrange(8 * len(whole)) for _ in range(60)]
    places += [8 * i + draw.randrange(8) for i in [*range(60), *range(len(whole) - 150, len(whole))]]
    for place in places:
        broken = bytearray(whole)
        broken[place // 8] ^= 1 << place % 8
        file = tmp_path / "broken.pt"
        file.write_bytes(broken)
        with pytest.raises(ValueError, match=r"broken.pt (is damaged|holds more)") as caught:
            checkpoint.read(file)
        assert "\n" not in str(caught.value)
        found += 1
    assert found == 60 + 60 + 150


def test_a_cut_file_is_found(good, tmp_path):
    whole = good.read_bytes()
    for size in (0, 1, 10, 63, 64, 65, 1000, len(whole) // 2, len(whole) - 64, len(whole) - 1):
        file = tmp_path / "cut.pt"
        file.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="cut.pt is damaged"):
            checkpoint.read(file)
    file.write_bytes(whole + b"x")
    with pytest.raises(ValueError, match="cut.pt is damaged"):
        checkpoint.read(file)
    for junk in (b"\x00" * 5000, random.Random(1).randbytes(5000), b"PK\x03\x04" + b"\x80" * 500):
        file.write_bytes(junk)
        with pytest.raises(ValueError, match="cut.pt is damaged"):
            checkpoint.read(file)


class Evil:
    def __reduce__(self):
        return os.mkdir, ("hacked",)


@pytest.mark.parametrize("how", ["zip", "signed", "legacy", "pickle"])
def test_nothing_in_a_file_is_ever_executed(how, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "evil.pt"
    if how == "signed":  # by our own hand, so the checksum holds
        checkpoint.save(file, state(evil=Evil()))
    elif how == "pickle":
        file.write_bytes(pickle.dumps({"format": 1, "evil": Evil()}))
    else:
        torch.save({"format": 1, "evil": Evil()}, file, _use_new_zipfile_serialization=how == "zip")
    with pytest.raises(ValueError, match="evil.pt (holds more than tensors and plain data|is damaged or no)"):
        checkpoint.read(file)
    assert not Path("hacked").exists()
    torch.load(file, weights_only=False) if how == "zip" else None
    assert Path("hacked").exists() == (how == "zip"), "no empty claim"


def test_other_peoples_files_and_newer_ones_are_refused(tmp_path):
    torch.save({"model": {}}, tmp_path / "theirs.pt")
    with pytest.raises(ValueError, match="not written by this project"):
        checkpoint.read(tmp_path / "theirs.pt")
    torch.save([1, 2], tmp_path / "theirs.pt")
    with pytest.raises(ValueError, match="not written by this project"):
        checkpoint.read(tmp_path / "theirs.pt")
    checkpoint.save(tmp_path / "new.pt", state(format=checkpoint.FORMAT + 1))
    with pytest.raises(ValueError, match="newer version"):
        checkpoint.read(tmp_path / "new.pt")
    odd = state()
    odd["model_config"]["flavour"] = "vanilla"
    checkpoint.save(tmp_path / "odd.pt", odd)
    with pytest.raises(ValueError, match="settings unknown here: flavour"):
        checkpoint.load(tmp_path / "odd.pt")


def test_the_checksum_is_the_comment_of_the_zip(good):
    whole = good.read_bytes()
    assert struct.unpack("<H", whole[-66:-64])[0] == 64 and zipfile.ZipFile(good).comment == whole[-64:]


# ----------------------------------------------------------------------------------------------------------
# A disk that fails while saving


def failing(monkeypatch, where: str, error: Exception, times: int = 10**9) -> list[int]:
    """Make the next `times` calls of os.fsync, os.replace, torch.save or of a file's writing raise."""
    module, name = {
        "fsync": (os, "fsync"),
        "replace": (os, "replace"),
        "save": (torch, "save"),
        "open": (checkpoint, "open"),
    }[where]
    real, calls = getattr(module, name, open), []

    def broken(*args, **kwargs):
        calls.append(0)
        if len(calls) <= times:
            raise error
        return real(*args, **kwargs)

    monkeypatch.setattr(module, name, broken, raising=False)
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
def test_a_failed_save_leaves_the_old_checkpoint(name, tmp_path, monkeypatch):
    where, error = FAULTS[name]
    checkpoint.save(tmp_path / "latest.pt", state(step=1))
    old = (tmp_path / "latest.pt").read_bytes()
    with monkeypatch.context() as patch:
        failing(patch, where, error)
        with pytest.raises(type(error)):
            checkpoint.save(tmp_path / "latest.pt", state(step=2), tmp_path / "previous.pt")
    assert [p.name for p in tmp_path.iterdir()] == ["latest.pt"], "and no half file"
    assert (tmp_path / "latest.pt").read_bytes() == old


def test_renaming_that_fails_half_way_leaves_a_checkpoint(tmp_path, monkeypatch):
    """The old one is previous.pt by then, and the run goes on from it."""
    checkpoint.save(tmp_path / "latest.pt", state(step=1))
    real = os.replace

    def second_fails(old, new):
        if Path(new).name == "latest.pt":
            raise OSError(errno.EIO, "I/O error")
        real(old, new)

    monkeypatch.setattr(os, "replace", second_fails)
    with pytest.raises(OSError):
        checkpoint.save(tmp_path / "latest.pt", state(step=2), tmp_path / "previous.pt")
    assert runs.last_state(tmp_path)["step"] == 1


@pytest.mark.parametrize("name", FAULTS)
def test_saving_is_tried_again(name, main, monkeypatch):
    """Two failures are survived with two loud warnings, and nothing of the run is different."""
    assert main("straight") == 0
    naps, step = [], train.Trainer.train_step
    with monkeypatch.context() as patch:
        patch.setattr(time, "sleep", naps.append)

        def fail_at_5(self, n):
            if n == 4:
                failing(patch, *FAULTS[name], times=2)
            return step(self, n)

        patch.setattr(train.Trainer, "train_step", fail_at_5)
        assert main("run") == 0
    assert main.stderr.count("WARNING: could not save") == main.stderr.count("trying again") == 2
    assert [nap for nap in naps if nap >= 1] == [1, 5]
    assert metrics("run") == metrics("straight") and bit_equal(run_state("run"), run_state("straight"))


@pytest.mark.parametrize("file", ["latest.pt", "best.pt"])
@pytest.mark.parametrize("name", FAULTS)
def test_several_failures_end_the_run_with_status_1(name, file, main, monkeypatch):
    where, error = FAULTS[name]
    step, begin = train.Trainer.train_step, {"latest.pt": 14, "best.pt": 11}[file]
    with monkeypatch.context() as patch:
        patch.setattr(time, "sleep", lambda seconds: None)

        def fail_from(self, n):
            if n == begin:
                failing(patch, where, error)
            return step(self, n)

        patch.setattr(train.Trainer, "train_step", fail_from)
        assert main("run", save_interval=5) == 1
    assert main.stderr.count(f"WARNING: could not save {file}") == 3
    assert "error: run cannot be written to" in main.stderr and "Traceback" not in main.stderr
    assert run_state("run")["step"] == 10
    assert checkpoint.read("run/best.pt")["step"] == (6 if file == "best.pt" else 12)
    assert not list(Path("run").glob("*.tmp"))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="limits of POSIX")
def test_a_file_system_that_is_really_full(tmp_path, corpus):
    """The kernel refuses to let any file grow over 60 kB: the best.pt fits, latest.pt does not."""
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
    """In the updates of these numbers no line gets to metrics.jsonl, only half of it."""
    step, now = train.Trainer.train_step, [0]

    class Full(io.TextIOWrapper):
        def write(self, text):
            if now[0] in steps:
                super().write(text[: len(text) // 2])
                self.flush()
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return super().write(text)

    def counting(self, n):
        now[0] = n + 1
        return step(self, n)

    monkeypatch.setattr(train.Trainer, "train_step", counting)
    monkeypatch.setattr(runs, "open", lambda f, m, encoding: Full(open(f, m + "b"), encoding), raising=False)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)


def test_metrics_that_cannot_be_written_are_written_later(main, monkeypatch):
    assert main("straight") == 0
    with monkeypatch.context() as patch:
        full_disk(patch, range(7, 10))
        assert main("run") == 0
    warning = "WARNING: could not write metrics.jsonl at step 8: [Errno 28] No space left on device"
    assert warning in main.stderr and main.stderr.count("WARNING") == 1
    assert metrics("run") == metrics("straight") and bit_equal(run_state("run"), run_state("straight"))


def test_a_checkpoint_is_not_saved_where_the_lines_before_it_cannot_be(main, monkeypatch):
    with monkeypatch.context() as patch:
        full_disk(patch, range(7, 100))
        assert main("run") == 1
    assert main.stderr.count("WARNING: could not save latest.pt at step 10") == 3
    assert "error: run cannot be written to" in main.stderr and "Traceback" not in main.stderr
    assert run_state("run")["step"] == 5 and metrics("run")[-1]["step"] == 6, "and no half line"
    assert main("run", "--resume") == 0 and "at step 5" in main.stderr
    assert main("straight") == 0 and metrics("run") == metrics("straight")


def test_metrics_survive_a_power_cut_as_far_as_checkpoints_do(main, monkeypatch):
    """Before a file takes its name, the lines of metrics up to it are synced."""
    synced, checked, fsync, replace = {}, [], os.fsync, os.replace

    def syncing(handle):
        fsync(handle)
        synced[os.fstat(handle).st_ino] = os.fstat(handle).st_size

    def replacing(old, new):
        if Path(new).name in ("latest.pt", "metrics.jsonl"):
            found = Path(old if Path(new).suffix == ".jsonl" else "run/metrics.jsonl").stat()
            assert synced.get(found.st_ino) == found.st_size
            checked.append(Path(new).name)
        replace(old, new)

    monkeypatch.setattr(os, "fsync", syncing)
    monkeypatch.setattr(os, "replace", replacing)
    assert main("run", stop_after=12) == 143 and main("run", "--resume") == 0
    assert checked.count("metrics.jsonl") == 2 and checked.count("latest.pt") == 6


def test_a_torn_line_of_metrics_is_cut_off(main):
    assert main("straight") == 0
    assert main("run", stop_after=10) == 143
    with open("run/metrics.jsonl", "a") as file:
        file.write('{"step": 11, "split": "train", "loss": 3.1, "tok')
    assert main("run", "--resume") == 0
    assert metrics("run") == metrics("straight")


def test_a_damaged_checkpoint_never_takes_the_place_of_the_good_one(main):
    assert main("run", stop_after=18) == 143
    os.truncate("run/latest.pt", 5000)
    assert main("run", "--resume", stop_after=17) == 143 and "at step 15" in main.stderr
    assert checkpoint.read("run/latest.pt")["step"] == 17 and checkpoint.read("run/previous.pt")["step"] == 15


def test_what_a_kill_left_behind_is_cleared(main):
    assert main("run", stop_after=10) == 143
    shutil.copy("run/latest.pt", "run/latest.pt.99999.tmp")
    assert main("run", "--resume") == 0
    assert not list(Path("run").glob("*.tmp"))


def test_the_fingerprint_tells_data_apart():
    def fingerprint(data):
        return runs.fingerprint(data.train, data.val)

    one, other = random_data(), random_data(seed=1)
    assert fingerprint(one) == fingerprint(random_data()) != fingerprint(other)
    assert fingerprint(one) != fingerprint(one._replace(val=one.val[:-1]))


# ----------------------------------------------------------------------------------------------------------
# A checkpoint of an earlier version


OLD = Path(__file__).parent / "checkpoint_f6ca03e"  # written by commit f6ca03e, with what came of it there


@pytest.fixture
def earlier(tmp_path, monkeypatch) -> dict:
    """In the current directory: that version's run `run` and its data, prepared anew. -> what it computed."""
    monkeypatch.chdir(tmp_path)
    prepare.prepare("mini", "byte", source=str(OLD / "stories.txt"))
    Path("run").mkdir()
    for name in ("latest.pt", "metrics.jsonl"):
        shutil.copy(OLD / name, "run")
    return json.loads((OLD / "expected.json").read_text())


def test_an_earlier_version_s_checkpoint_scores_the_same(earlier):
    model, tok = checkpoint.load("run")
    assert model.config.separator == tok.eot, "document masking was a setting of the training"
    data = datasets.load_data("data/mini/byte")
    nats, count = score.total(model, [data.val], tok.eot, rows=4)
    assert count == earlier["val_tokens"] and nats == pytest.approx(earlier["val_nats"], rel=1e-6)
    ids = tok.encode("Once upon a time, there was a little girl.")
    found = score.loglikelihood(model, [tok.eot], ids)
    assert found == pytest.approx(earlier["loglikelihood"], rel=1e-6)


def test_an_earlier_version_s_run_resumes(earlier, capsys):
    assert train.main(["--out_dir=run", "--resume", "--max_iters=12"]) == 0, capsys.readouterr().err
    found = [line for line in metrics("run") if line["step"] > 6]
    key = [(line["step"], line["split"]) for line in earlier["resumed"]]
    assert [(line["step"], line["split"]) for line in found] == key
    losses = [line["loss"] for line in earlier["resumed"]]
    assert [line["loss"] for line in found] == pytest.approx(losses, rel=1e-5)


def test_an_earlier_version_s_progress_and_separator_are_taken_over():
    """The separator is end-of-text, the last id of the tokenizer, whatever its size."""
    tok = tokenizer.Tokenizer("bpe258", [bytes([b]) for b in range(256)] + [b"ab"])
    progress = dict(step=7, best=1.5, evaluated=6, skipped=2, elapsed=3.25)
    old = state(format=1, tokenizer=tok.state(), optimizers=[], waited=4, **progress)
    del old["model_config"]["separator"]
    for cross_stories, separator in ((False, tok.eot), (True, -1)):
        found = checkpoint.upgrade(old | {"train_config": {"cross_stories": cross_stories}})
        assert found["model_config"]["separator"] == separator and found["format"] == checkpoint.FORMAT
        assert runs.Progress(**found["progress"]) == runs.Progress(**progress, evals_since_best=4)


def test_an_earlier_version_s_average_of_weights_loads_but_does_not_resume(earlier, capsys):
    state = torch.load("run/latest.pt", weights_only=True)
    state["train_config"]["ema"] = 0.9
    checkpoint.save("run/latest.pt", state | {"format": 1})
    model, _ = checkpoint.load("run")
    assert model.config.n_embd == 4
    assert train.main(["--out_dir=run", "--resume", "--max_iters=12"]) == 2
    assert "--init_from=run" in capsys.readouterr().err
