"""The scripts as a user runs them: prepare, train, resume, sample; user errors, signals, processes."""

import hashlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import (
    MICRO,
    ROOT,
    Program,
    bit_equal,
    cli_args,
    max_difference,
    metrics,
    run_script,
    run_state,
    write_recipe,
)

import prepare
import train
from nanostlm import checkpoint, runs
from nanostlm.data import Bin

posix = pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")


# ----------------------------------------------------------------------------------------------------------
# All scripts in a row


def test_prepare_train_resume_sample(tmp_path, corpus):
    shutil.copy(corpus.parent / "mini.txt", tmp_path)
    (tmp_path / "config").mkdir()
    text = "\n".join(f"{key} = {value!r}" for key, value in MICRO.items())
    (tmp_path / "config" / "micro.py").write_text(text)
    run_script(ROOT / "prepare.py", "mini", "--source", "mini.txt", "--tokenizer", "byte", cwd=tmp_path)
    assert (tmp_path / "data/mini/byte/meta.json").is_file()
    err = run_script(ROOT / "train.py", "config/micro.py", "--max_iters=8", cwd=tmp_path).stderr
    folder = tmp_path / "out/micro"
    assert {p.name for p in folder.iterdir()} >= {
        "latest.pt",
        "previous.pt",
        "best.pt",
        "metrics.jsonl",
        "loss.png",
    }
    assert not list(folder.glob("*.tmp"))
    assert "in out/micro" in err and err.rstrip().splitlines()[-1].startswith("next:  python sample.py")
    result = run_script(ROOT / "sample.py", "--prompt", "Tom", "--max_new_tokens", "9", cwd=tmp_path)
    assert result.stdout.startswith("Tom")


def test_checkpoint_is_self_contained(tmp_path, main):
    assert main("run") == 0
    shutil.copy("run/latest.pt", tmp_path / "copy.pt")
    shutil.rmtree("run")
    model, tok = checkpoint.load(tmp_path / "copy.pt")
    assert tok.decode(tok.encode("Tom ☂")) == "Tom ☂" and not model.training


# ----------------------------------------------------------------------------------------------------------
# User errors: one line on stderr, exit status 2, no file changed


def contents(folder) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file() and p.name != "lock"}


def refused(main, message: str, *args, status: int = 2, **changes) -> None:
    """Check that main(...) fails with one line that matches `message`, and changes no file or folder."""
    before = contents(".")
    folders = sorted(p for p in Path(".").rglob("*") if p.is_dir())
    assert main(*args, **changes) == status, main.stderr
    errors = [line for line in main.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and re.search(message, errors[0]), main.stderr
    assert "Traceback" not in main.stderr and len(errors[0]) < 500
    assert contents(".") == before
    assert sorted(p for p in Path(".").rglob("*") if p.is_dir()) == folders


RECIPES = {
    "n_headd = 4": "mine.py, line 1: there is no setting 'n_headd'; did you mean 'n_head'",
    "n_layer = 'two'": "mine.py, line 1: n_layer must be a whole number, not 'two'",
    "\nn_layer = = 2": "mine.py, line 2: invalid syntax",
    "import os": "mine.py, line 1: .*only assignments",
    "n_layer = print(3)": "mine.py, line 1: .*only literals",
    "vocab_size = 300": "vocab_size comes from the tokenizer",
}


@pytest.mark.parametrize("text", RECIPES)
def test_recipe_errors(text, main):
    Path("mine.py").write_text(text)
    refused(main, RECIPES[text], "", "mine.py", micro=False)


SETTINGS = {
    ("--n_headd=4",): "no option '--n_headd'; did you mean '--n_head'",
    ("nope.py",): r"no recipe nope.py; there are: .*tiny.py",
    ("--n_head=3",): "n_head=3 does not divide n_embd=16",
    ("--n_embd=-16",): "n_embd must be between 1 and 1,000,000,000, not -16",
    ("--batch_size=-1",): "batch_size must be between 1 and .*, not -1",
    ("--max_iters=-1",): "max_iters must be between 0 and",
    ("--n_layer=0",): "n_layer must be between 1 and",
    ("--learning_rate=-1",): "learning_rate must be",
    ("--block_size=100000",): "fewer than one window of block_size=100000",
    ("--dtype=int4",): "dtype must be one of",
    ("--device=tpu",): "device must be",
    ("--optimizer=adam",): "optimizer must be one of adamw, muon",
    ("--tokenizer=word",): "no tokenizer .*'word'",
    ("--dataset=nowhere",): "python prepare.py nowhere --source",
    ("--dropout_schedule=0-1",): "dropout_schedule is a list like",
    ("--resume",): "nothing to resume: .*holds no run",
    ("--logger=paper",): "logger must be one of",
    ("--seed=1" + 30 * "0",): "seed",
}


@pytest.mark.parametrize("argv", SETTINGS, ids=" ".join)
def test_command_line_errors(argv, main):
    refused(main, SETTINGS[argv], "run", *argv)


def test_resume_without_unfinished_run(main):
    refused(main, "no unfinished run out/run", "", "--resume")
    micro = write_recipe("micro")
    assert main("", micro, micro=False) == 0
    refused(main, "no unfinished run out/micro", "", micro, "--resume", micro=False)


def test_out_dir_with_a_run_needs_a_flag(main):
    assert main("run") == 0
    refused(main, "run holds a run; --resume .* --overwrite", "run")
    old = run_state("run")
    assert main("run", "--overwrite", seed=1) == 0
    assert not bit_equal(run_state("run")["model"], old["model"]) and len(metrics("run", "val")) == 5
    for folder in ("out", "run"):  # a folder without a run is fine
        Path("empty", folder).mkdir(parents=True)
        assert main(f"empty/{folder}", max_iters=2) == 0


def test_overwrite_discards_only_when_the_run_starts(main):
    assert main("run") == 0
    refused(main, "fewer than one window", "run", "--overwrite", block_size=100_000)


def test_damaged_data(main, corpus, tmp_path):
    def damaged_copy(name, change):
        folder = tmp_path / name / "mini" / "byte"
        shutil.copytree(corpus / "mini" / "byte", folder)
        change(folder)
        return tmp_path / name

    def truncated_train(folder):
        os.truncate(folder / "train.bin", 999)

    def invalid_id(folder):
        ids = np.fromfile(folder / "train.bin", "<u2")
        ids[100] = 300
        ids.tofile(folder / "train.bin")

    def other_vocabulary(folder):
        meta = json.loads((folder / "meta.json").read_text())
        meta["tokenizer"]["sha256"] = "0" * 64
        (folder / "meta.json").write_text(json.dumps(meta))

    def truncated_val(folder):
        os.truncate(folder / "val.bin", 10)

    for change, message in {
        truncated_train: "train.bin .*python prepare.py mini",
        invalid_id: "300.*python prepare.py mini",
        other_vocabulary: "vocabulary.*python prepare.py mini",
        truncated_val: "val.bin .*prepare.py mini",
    }.items():
        data_dir = damaged_copy(change.__name__, change)
        refused(main, message, "run", data_dir=data_dir)


def test_validation_file_shorter_than_one_window(main):
    assert main("run", block_size=600, eval_tokens=0, batch_size=2, max_iters=2) == 0
    assert metrics("run", "val")[-1]["bpb"] > 1


def test_more_stories_than_prepared(main, corpus, tmp_path):
    prepare.prepare(
        "mini", "byte", source=str(corpus.parent / "mini.txt"), stories=20, data_dir=tmp_path / "few"
    )
    assert main("run", data_dir=tmp_path / "few", stories=20, max_iters=1) == 0
    refused(
        main,
        r"only the first 20 stories.*python prepare.py mini",
        "more",
        data_dir=tmp_path / "few",
        stories=30,
    )
    refused(
        main,
        r"only the first 20 stories.*python prepare.py mini",
        "all",
        data_dir=tmp_path / "few",
        stories=0,
    )


def test_damaged_checkpoint_falls_back_to_previous(main):
    assert main("straight") == 0
    assert main("run", stop_after=18) == 143
    os.truncate("run/latest.pt", 5000)
    assert main("run", "--resume") == 0
    assert "WARNING: run/latest.pt is damaged" in main.stderr and "at step 15" in main.stderr
    assert metrics("run") == metrics("straight") and bit_equal(run_state("run"), run_state("straight"))
    for name in ("latest", "previous"):
        os.truncate(f"run/{name}.pt", 5000)
    refused(main, "run/previous.pt is damaged", "run", "--resume")


def test_too_little_disk_space_is_an_error_before_the_first_step(main, monkeypatch):
    usage = shutil.disk_usage(".")._replace(free=10_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    assert main("run") == 1
    assert (
        "has 0 MB left" in main.stderr
        and "Traceback" not in main.stderr
        and not Path("run/metrics.jsonl").exists()
    )


# ----------------------------------------------------------------------------------------------------------
# Run directories, plans, notes


def test_default_out_dirs_are_numbered(main):
    micro = write_recipe("micro", max_iters=2)
    for name in ("micro", "micro-2", "micro-3"):
        assert main("", micro, micro=False) == 0
        assert f"run      out/{name}\n" in main.stderr and Path("out", name, "latest.pt").is_file()
    assert main("", micro, "--resume", micro=False, max_iters=4) == 0 and "out/micro-3" in main.stderr
    assert len(list(Path("out").iterdir())) == 3


def test_resume_selects_newest_unfinished_run_of_the_recipe(main):
    micro, other = write_recipe("micro"), write_recipe("micro2")
    assert main("", micro, micro=False, stop_after=3) == 143
    assert main("", micro, micro=False, stop_after=4) == 143
    assert main("", micro, micro=False) == 0  # out/micro-3, finished
    assert main("", other, micro=False, stop_after=2) == 143
    assert sorted(p.name for p in Path("out").iterdir()) == ["micro", "micro-2", "micro-3", "micro2"]
    assert main("", micro, "--resume", micro=False) == 0 and "out/micro-2 at step 4" in main.stderr
    assert main("", micro, "--resume", micro=False) == 0 and "out/micro at step 3" in main.stderr
    assert main("", micro, "--resume", micro=False) == 2 and "nothing to resume" in main.stderr
    assert main("", other, "--resume", micro=False) == 0 and "out/micro2 at step 2" in main.stderr


def test_run_ended_by_patience_is_finished(main):
    """With patience=0 it resumes, and equals a run that had patience=0 from the start."""
    micro = write_recipe("micro", eval_interval=2, learning_rate=0.5)
    assert main("", micro, micro=False, patience=2) == 0
    ended = run_state("out/micro")["step"]
    assert ended < 24
    refused(main, "nothing to resume: no unfinished run out/micro", "", micro, "--resume", micro=False)
    assert main("", micro, "--resume", micro=False, patience=0) == 0 and f"at step {ended}" in main.stderr
    assert main("", micro, micro=False) == 0 and "out/micro-2" in main.stderr
    assert metrics("out/micro") == metrics("out/micro-2") and metrics("out/micro")[-1]["step"] == 24


def test_max_iters_0_prints_the_plan(main):
    before = contents(".")
    assert (
        main("", write_recipe("micro", max_iters=50, gradient_accumulation_steps=2), micro=False, max_iters=0)
        == 0
    )
    for part in (
        "parameters",
        "8 rows x 16 = 128 tokens a step",
        "50 steps",
        "epochs",
        "MB of memory",
        "MB of disk",
    ):
        assert part in main.stderr
    assert not Path("out").exists() and contents(".").keys() - before.keys() == {"micro.py"}


def test_warmup_longer_than_the_run_is_cut_with_a_note(main):
    assert main("run", warmup_iters=100, max_iters=10, log_interval=1) == 0
    assert "warmup_iters=100 is cut to 5" in main.stderr
    assert max(line["lr"] for line in metrics("run", "train")) == pytest.approx(0.01)
    assert main("", warmup_iters=10, max_iters=10) == 0 and "warmup_iters=10 is cut to 5" in main.stderr
    assert main("", warmup_iters=9, max_iters=10) == 0 and "is cut" not in main.stderr


# ----------------------------------------------------------------------------------------------------------
# Resuming with other settings


def test_changeable_settings_are_applied_and_printed(main):
    assert main("run", stop_after=4) == 143
    changes = dict(
        max_iters=20,
        eval_interval=3,
        save_interval=4,
        log_interval=5,
        patience=9,
        threads=1,
        batch_size=2,
        gradient_accumulation_steps=2,
        prompt="Mia",
        loss_chunk=8,
    )
    assert main("run", "--resume", micro=False, **changes) == 0
    for name in changes.keys() - {"threads"}:
        assert f"changed for the rest of the run: {name}: " in main.stderr
    assert "threads" not in main.stderr, "it did not change"
    config = checkpoint.read("run/latest.pt")["train_config"]
    assert all((config | config["model"])[name] == value for name, value in changes.items())


@pytest.mark.parametrize(
    "name, value",
    dict(
        learning_rate=0.02,
        schedule="linear",
        seed=2,
        weight_decay=0.0,
        optimizer="muon",
        dropout=0.1,
        n_embd=32,
        block_size=8,
        story_windows=True,
        warmup_iters=3,
        grad_clip=0.5,
        batch_size=8,
    ).items(),
)
def test_other_settings_cannot_change_on_resume(name, value, main):
    assert main("run", stop_after=4) == 143
    refused(
        main, f"cannot change on resume: {name}.*--override", "run", "--resume", micro=False, **{name: value}
    )
    status = main("run", "--resume", "--override", micro=False, **{name: value})
    if name in ("n_embd", "optimizer"):
        assert status == 2 and "the checkpoint does not fit these settings" in main.stderr
    else:
        assert status == 0 and f"{name}: " in main.stderr and metrics("run")[-1]["step"] == 24


def test_resume_with_edited_recipe(main):
    write_recipe("micro", dropout=0.1)
    assert main("", "micro.py", micro=False, stop_after=4, learning_rate=0.005) == 143
    write_recipe("micro", dropout=0.1, eval_interval=2)
    assert main("", "micro.py", "--resume", micro=False, stop_after=6) == 143
    assert "eval_interval: 6 -> 2" in main.stderr, "edits are applied"
    assert "learning_rate" not in main.stderr, "settings of the first command line stay"
    write_recipe("micro", dropout=0.2, eval_interval=2)
    refused(main, "dropout: 0.1 -> 0.2", "", "micro.py", "--resume", micro=False)
    Path("micro.py").write_text(re.sub("dropout.*", "", Path("micro.py").read_text()))
    refused(main, "dropout: 0.1 -> 0.0", "", "micro.py", "--resume", micro=False)
    write_recipe("micro", dropout=0.1, eval_interval=2)
    assert main("out/micro", "--resume", micro=False, stop_after=8) == 143, "also without the recipe"
    assert main("", "micro.py", "--resume", micro=False) == 0
    assert metrics("out/micro", "train")[-1]["step"] == 24
    assert checkpoint.read("out/micro/latest.pt")["train_config"]["learning_rate"] == 0.005


def test_changed_code_is_reported(main):
    assert main("run", stop_after=4) == 143
    state = checkpoint.read("run/latest.pt")
    state["provenance"]["model.py"] = "something else"
    checkpoint.save("run/latest.pt", state)
    assert main("run", "--resume") == 0
    assert "model.py has changed since" in main.stderr and "train.py has changed" not in main.stderr


def test_resume_refuses_changed_data(main, corpus, tmp_path):
    data_dir = tmp_path / "mine"
    shutil.copytree(corpus, data_dir)
    assert main("run", data_dir=data_dir, stop_after=4) == 143
    file = data_dir / "mini" / "byte" / "train.bin"
    ids = np.fromfile(file, "<u2")
    ids[1000] ^= 1
    ids.tofile(file)
    refused(main, "differ from the data that this run was started with", "run", "--resume", data_dir=data_dir)
    ids[1000] ^= 1
    ids.tofile(file)
    assert main("run", "--resume", data_dir=data_dir) == 0


def test_stories_selects_the_first_of_more_prepared(main, corpus, tmp_path):
    """Such a run equals one where only these are prepared, and it resumes after more have been prepared."""
    texts = (corpus.parent / "mini.txt").read_text().split("\n\n")
    for name, part in (("train", texts[:30]), ("validation", texts[30:])):
        (tmp_path / "source").mkdir(exist_ok=True)
        (tmp_path / "source" / f"{name}.txt").write_text("\n\n".join(part))
    kwargs = dict(source=str(tmp_path / "source"), data_dir=tmp_path / "data")
    prepare.prepare("mini", "byte", stories=10, **kwargs)
    assert main("few", data_dir=tmp_path / "data", stories=10) == 0
    assert main("run", data_dir=tmp_path / "data", stories=10, stop_after=4) == 143
    prepare.prepare("mini", "byte", **kwargs)
    assert main("run", "--resume", micro=False, data_dir=tmp_path / "data") == 0
    assert main("many", data_dir=tmp_path / "data", stories=10) == 0 and ": 10 stories, " in main.stderr
    for run in ("run", "many"):
        assert metrics("few") == metrics(run) and bit_equal(run_state("few"), run_state(run))
    assert main("all", data_dir=tmp_path / "data") == 0 and ": 30 stories, " in main.stderr
    assert metrics("all") != metrics("few")


def test_stories_cannot_change_on_resume(main, corpus, tmp_path):
    assert main("run", stories=10, stop_after=4) == 143
    for n in (9, 30, 0):
        message = f"cannot change on resume: stories: 10 -> {n}"
        refused(main, message, "run", "--resume", micro=False, stories=n)
    refused(
        main, "differ from the data that this run", "run", "--resume", "--override", micro=False, stories=9
    )


def test_fallback_uses_the_same_number_of_stories(main, tmp_path):
    """The Hub is unreachable because conftest.py sets HF_HUB_OFFLINE."""
    offline = dict(dataset="tinystories", fallback="toystories", data_dir="data")
    assert main("run", **offline, stories=50, stop_after=4) == 143
    assert "TRAINING ON TOYSTORIES INSTEAD" in main.stderr
    config = checkpoint.read("run/latest.pt")["train_config"]
    assert (config["dataset"], config["stories"]) == ("toystories", 50)
    assert main("run", "--resume", micro=False, stories=50) == 0
    assert main("fewer", **offline, stories=20, max_iters=1) == 0 and ": 20 stories, " in main.stderr
    refused(
        main,
        r"only the first 50 .*python prepare.py toystories .*--stories 60",
        "more",
        **offline,
        stories=60,
    )


# ----------------------------------------------------------------------------------------------------------
# Signals, kills, concurrent runs


LONG = dict(
    max_iters=100_000, eval_interval=50_000, save_interval=50_000, schedule="constant", log_interval=1
)


@posix
@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)], ids=str)
def test_signal_saves_within_one_step(number, status, tmp_path, corpus, main):
    run = Program(cli_args(corpus, out_dir="run", **LONG), tmp_path)
    run.until("step      1")
    run.signal(number)
    assert run.wait() == status
    assert "saved at step" in run.text and "--resume" in run.text and "Traceback" not in run.text
    step = metrics("run")[-1]["step"]
    assert run_state("run")["step"] == step >= 1
    assert main("run", "--resume", micro=False, max_iters=step + 7) == 0
    assert main("straight", **LONG | dict(max_iters=step + 7)) == 0
    assert metrics("run") == metrics("straight") and bit_equal(run_state("run"), run_state("straight"))


@posix
@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)], ids=str)
@pytest.mark.parametrize("when", ["preparing", "compiling"])
def test_signal_before_the_first_step(when, number, status, tmp_path, corpus):
    changes = dict(dataset="mine", source=corpus.parent / "mini.txt", data_dir="data", compile="True")
    run = Program(cli_args(corpus, **changes, out_dir="run"), tmp_path, hook=(slow_start, when))
    run.until("busy now")
    run.signal(signal.SIGUSR1)
    time.sleep(0.2)
    assert run.process.is_alive(), "SIGUSR1 is ignored while there is nothing to save"
    run.signal(number)
    assert run.wait(10) == status
    name = signal.Signals(number).name
    assert run.text.splitlines()[-1] == f"{name}: ended, with nothing lost" and "Traceback" not in run.text
    files = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    expected = {f"data/mine/byte/{name}" for name in ("train.bin", "val.bin", "meta.json")}
    expected |= {"run/lock", "run/metrics.jsonl", "run/config.json"}
    assert files - {run.output.name} == (expected if when == "compiling" else set())


def slow_start(when: str) -> None:
    """Make preparing the data or compiling take a minute."""

    def busy(*args, **kwargs):
        print("busy now", file=sys.stderr, flush=True)
        end = time.monotonic() + 60
        while time.monotonic() < end:
            time.sleep(0.01)

    if when == "preparing":
        Bin.write = busy
    else:
        torch.compile = busy


@posix
def test_sigusr1_saves_and_continues(tmp_path, corpus):
    run = Program(cli_args(corpus, out_dir="run", **LONG), tmp_path)
    run.until("step      1")
    run.signal(signal.SIGUSR1)
    end = time.monotonic() + 30
    while not (tmp_path / "run/latest.pt").exists() and time.monotonic() < end:
        time.sleep(0.01)
    saved = run_state(tmp_path / "run")["step"]
    while metrics_so_far(tmp_path / "run")[-1]["step"] < saved + 5 and time.monotonic() < end:
        time.sleep(0.01)
    assert metrics_so_far(tmp_path / "run")[-1]["step"] >= saved + 5
    run.kill()


def metrics_so_far(folder) -> list[dict]:
    return runs.read_metrics(Path(folder))


@posix
def test_second_ctrl_c_exits_immediately_and_damages_nothing(tmp_path, corpus, main):
    run = Program(
        cli_args(corpus, out_dir="run", **LONG | dict(save_interval=5)), tmp_path, hook=(slow_saves, 30)
    )
    run.until("saving now")
    run.signal(signal.SIGINT)
    run.until("once more ends at once")
    time.sleep(1.1)  # until then, it could be a key held down
    run.signal(signal.SIGINT)
    assert run.wait(10) == 130
    assert main("run", "--resume", **LONG | dict(max_iters=12)) == 0
    assert "starting at step 0" in main.stderr and not list(Path("run").glob("*.tmp"))


def slow_saves(seconds: float) -> None:
    """Delay each save between writing and renaming."""
    real = hashlib.file_digest

    def file_digest(*args):
        print("saving now", file=sys.stderr, flush=True)
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            time.sleep(0.01)
        return real(*args)

    hashlib.file_digest = file_digest


@posix
def test_concurrent_runs_in_one_out_dir(tmp_path, corpus, main):
    """The second is refused while the first runs; kill -9 releases the lock."""
    run = Program(cli_args(corpus, out_dir="run", **LONG | dict(save_interval=5)), tmp_path)
    run.until("step      1")
    while not Path("run/previous.pt").exists():
        time.sleep(0.01)
    for flag in ("--resume", "--overwrite"):
        assert main("run", flag, **LONG) == 2 and "another run is writing to run" in main.stderr
    assert run.process.is_alive()
    run.kill()
    latest = Path("run/latest.pt")  # the kill may fall between the two renames of a save
    step = checkpoint.read(latest if latest.exists() else "run/previous.pt")["step"]
    assert step >= 10
    assert main("run", "--resume", micro=False, max_iters=step + 2) == 0
    assert f"at step {step:,}" in main.stderr


@posix
def test_killed_before_the_first_save(tmp_path, corpus, main):
    run = Program(cli_args(corpus, out_dir="run", **LONG), tmp_path)
    run.until("step      1")
    run.kill()
    assert main("run", "--resume", **LONG | dict(max_iters=10)) == 0
    assert "has no checkpoint yet: starting at step 0" in main.stderr
    assert main("straight", **LONG | dict(max_iters=10)) == 0
    assert metrics("run") == metrics("straight")


# ----------------------------------------------------------------------------------------------------------
# Several processes


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def ranks(world_size: int, argv: list[str], folder, hooks: dict | None = None) -> list[Program]:
    """Start the processes that torchrun would start."""
    env = {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [
        Program(argv, folder, env | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, (hooks or {}).get(rank, ()))
        for rank in range(world_size)
    ]


def save_gradients(file: str) -> None:
    """Save the gradients of the first update, averaged over the processes."""
    update = train.Trainer.update

    def save_and_update(self, finite):
        if self.progress.step == 0:
            torch.save([p.grad for p in self.model.parameters()], file)
        update(self, finite)

    train.Trainer.update = save_and_update


@posix
@pytest.mark.parametrize("accumulation", [2, 1], ids=["by micro-batches", "by rows"])
def test_two_processes_match_one(accumulation, tmp_path, corpus):
    """Also, a run of two processes resumes with one."""
    changes = dict(gradient_accumulation_steps=accumulation, grad_clip=0.0, log_interval=1, max_iters=12)
    one = Program(cli_args(corpus, out_dir="one", **changes), tmp_path, hook=(save_gradients, "one.pt"))
    two = ranks(2, cli_args(corpus, out_dir="two", **changes), tmp_path, {0: (save_gradients, "two.pt")})
    assert [p.wait() for p in (one, *two)] == [0, 0, 0], two[0].text + two[1].text
    assert max_difference(torch.load(tmp_path / "one.pt"), torch.load(tmp_path / "two.pt")) < 1e-6
    a, b = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    assert [(x["step"], x["split"], x["tokens"]) for x in a] == [
        (x["step"], x["split"], x["tokens"]) for x in b
    ]
    assert [x["loss"] for x in a] == pytest.approx([x["loss"] for x in b], rel=1e-4)
    assert [x["bpb"] for x in a if "bpb" in x] == pytest.approx([x["bpb"] for x in b if "bpb" in x], rel=1e-4)
    assert two[1].text == "", "only rank 0 prints"
    argv = cli_args(corpus, out_dir="two", **changes | dict(max_iters=14)) + ["--resume"]
    assert Program(argv, tmp_path).wait() == 0 and metrics(tmp_path / "two")[-1]["step"] == 14


@posix
def test_resume_of_two_processes_is_bitwise_exact(tmp_path, corpus):
    """A signal to one rank stops both, one step later; the resumed run is bitwise equal."""
    changes = dict(gradient_accumulation_steps=2, dropout=0.1, log_interval=1, save_interval=7)
    straight = ranks(2, cli_args(corpus, out_dir="straight", **changes), tmp_path)
    stopped = ranks(2, cli_args(corpus, out_dir="stopped", **changes), tmp_path, {1: (terminate, 9)})
    assert [p.wait() for p in (*straight, *stopped)] == [0, 0, 143, 143], stopped[0].text
    assert run_state(tmp_path / "stopped")["step"] == 10
    resumed = ranks(2, cli_args(corpus, out_dir="stopped", **changes) + ["--resume"], tmp_path)
    assert [p.wait() for p in resumed] == [0, 0], resumed[0].text
    assert metrics(tmp_path / "stopped") == metrics(tmp_path / "straight")
    assert bit_equal(run_state(tmp_path / "stopped"), run_state(tmp_path / "straight"))


def terminate(after: int) -> None:
    """Send SIGTERM to this process in update `after`."""
    step = train.Trainer.train_step

    def train_step(self, n):
        if n + 1 == after:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, n)

    train.Trainer.train_step = train_step


@posix
@pytest.mark.parametrize("killed", [0, 1])
def test_killed_rank_stops_the_other(killed, tmp_path, corpus):
    """Within seconds, with an error message and no partial checkpoint; the run can be resumed."""
    changes = dict(gradient_accumulation_steps=2, log_interval=1)
    pair = ranks(2, cli_args(corpus, out_dir="run", **changes), tmp_path, {killed: (kill, 13)})
    assert pair[killed].wait() == -signal.SIGKILL
    assert pair[1 - killed].wait(10) == 1
    err = pair[1 - killed].text
    assert "error: another rank of this run has exited" in err and "Traceback" not in err
    assert run_state(tmp_path / "run")["step"] == 10 and not list((tmp_path / "run").glob("*.tmp"))
    resumed = ranks(2, cli_args(corpus, out_dir="run", **changes) + ["--resume"], tmp_path)
    straight = ranks(2, cli_args(corpus, out_dir="straight", **changes), tmp_path)
    assert [p.wait() for p in (*resumed, *straight)] == [0] * 4
    assert metrics(tmp_path / "run") == metrics(tmp_path / "straight")
    assert bit_equal(run_state(tmp_path / "run"), run_state(tmp_path / "straight"))


def kill(after: int) -> None:
    """Send SIGKILL to this process in update `after`."""
    step = train.Trainer.train_step

    def train_step(self, n):
        if n + 1 == after:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(self, n)

    train.Trainer.train_step = train_step


@posix
def test_indivisible_world_size(tmp_path, corpus):
    trio = ranks(3, cli_args(corpus, out_dir="run", batch_size=4), tmp_path)
    assert [p.wait() for p in trio] == [2, 2, 2]
    assert "3 processes divide neither" in trio[0].text and not (tmp_path / "run").exists()


@pytest.mark.slow
@posix
def test_torchrun(tmp_path, corpus):
    """The real torchrun: SIGTERM saves, and the run resumes to its end."""

    def torchrun(*extra, **changes):
        argv = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node=2",
            str(ROOT / "train.py"),
            *cli_args(corpus, **changes),
            *extra,
        ]
        streams = dict(stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        return subprocess.Popen(argv, cwd=tmp_path, **streams)

    changes = dict(gradient_accumulation_steps=2, log_interval=1, out_dir="run")
    run = torchrun(**LONG | changes)
    end = time.monotonic() + 120
    while len(metrics_so_far(tmp_path / "run")) < 10 and time.monotonic() < end:
        time.sleep(0.1)
    run.send_signal(signal.SIGTERM)
    err = run.communicate(timeout=60)[1]
    assert "saved at step" in err and run.returncode != 0
    step = run_state(tmp_path / "run")["step"]
    assert step == metrics(tmp_path / "run")[-1]["step"]
    run = torchrun("--resume", **LONG | changes | dict(max_iters=step + 3))
    err = run.communicate(timeout=120)[1]
    assert run.returncode == 0 and f"at step {step:,}" in err, err
