"""The whole line as a person types it: prepare, train, resume, sample; mistakes, signals, processes."""

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
# The whole line


def test_prepare_train_resume_sample(tmp_path, corpus):
    shutil.copy(corpus.parent / "mini.txt", tmp_path)
    (tmp_path / "config").mkdir()
    text = "\n".join(f"{key} = {value!r}" for key, value in MICRO.items())
    (tmp_path / "config" / "micro.py").write_text(text)
    run_script(ROOT / "prepare.py", "mini", "--source", "mini.txt", "--tokenizer", "byte", cwd=tmp_path)
    assert (tmp_path / "data/mini/byte/meta.json").is_file()
    said = run_script(ROOT / "train.py", "config/micro.py", "--max_iters=8", cwd=tmp_path).stderr
    folder = tmp_path / "out/micro"
    assert {p.name for p in folder.iterdir()} >= {
        "latest.pt",
        "previous.pt",
        "best.pt",
        "metrics.jsonl",
        "loss.png",
    }
    assert not list(folder.glob("*.tmp"))
    assert "in out/micro" in said and said.rstrip().splitlines()[-1].startswith("next:  python sample.py")
    done = run_script(ROOT / "sample.py", "--prompt", "Tom", "--max_new_tokens", "9", cwd=tmp_path)
    assert done.stdout.startswith("Tom")


def test_a_checkpoint_needs_no_other_file(tmp_path, main):
    assert main("run") == 0
    shutil.copy("run/latest.pt", tmp_path / "alone.pt")
    shutil.rmtree("run")
    model, tok = checkpoint.load(tmp_path / "alone.pt")
    assert tok.decode(tok.encode("Tom ☂")) == "Tom ☂" and not model.training


# ----------------------------------------------------------------------------------------------------------
# Mistakes: one clear line, exit status 2, nothing lost


def contents(folder) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file() and p.name != "lock"}


def refused(main, said: str, *args, status: int = 2, **changes) -> None:
    """`main(...)` fails with one clear line, and leaves every file as it was and no folder behind."""
    before = contents(".")  # and no folder is made
    folders = sorted(p for p in Path(".").rglob("*") if p.is_dir())
    assert main(*args, **changes) == status, main.stderr
    error = [line for line in main.stderr.splitlines() if line.startswith("error: ")]
    assert len(error) == 1 and re.search(said, error[0]), main.stderr
    assert "Traceback" not in main.stderr and len(error[0]) < 500
    assert contents(".") == before
    assert sorted(p for p in Path(".").rglob("*") if p.is_dir()) == folders


RECIPES = {
    "n_headd = 4": "mine.py, line 1: there is no setting 'n_headd'; did you mean 'n_head'",
    "n_layer = 'two'": "mine.py, line 1: n_layer takes a whole number, not 'two'",
    "\nn_layer = = 2": "mine.py, line 2: invalid syntax",
    "import os": "mine.py, line 1: .*only assignments",
    "n_layer = print(3)": "mine.py, line 1: .*only literals",
    "vocab_size = 300": "vocab_size comes from the tokenizer",
}


@pytest.mark.parametrize("text", RECIPES)
def test_mistakes_in_a_recipe(text, main):
    Path("mine.py").write_text(text)
    refused(main, RECIPES[text], "", "mine.py", micro=False)


SETTINGS = {
    ("--n_headd=4",): "no option '--n_headd'; did you mean '--n_head'",
    ("nope.py",): r"no recipe nope.py; there are: .*tiny.py",
    ("--n_head=3",): "n_head=3 does not divide n_embd=16",
    ("--n_embd=-16",): "n_embd must be at least 1, not -16",
    ("--batch_size=-1",): "batch_size must be at least 1, not -1",
    ("--max_iters=-1",): "max_iters must be at least 0",
    ("--n_layer=0",): "n_layer must be at least 1",
    ("--learning_rate=-1",): "learning_rate must be",
    ("--block_size=100000",): "too few for one window of block_size=100000",
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
def test_mistakes_on_the_command_line(argv, main):
    refused(main, SETTINGS[argv], "run", *argv)


def test_resume_where_nothing_is(main):
    refused(main, "no unfinished run out/run", "", "--resume")
    micro = write_recipe("micro")
    assert main("", micro, micro=False) == 0
    refused(main, "no unfinished run out/micro", "", micro, "--resume", micro=False)


def test_an_out_dir_given_by_hand_that_holds_a_run(main):
    assert main("run") == 0
    refused(main, "run holds a run; --resume .* --overwrite", "run")
    old = run_state("run")
    assert main("run", "--overwrite", seed=1) == 0
    assert not bit_equal(run_state("run")["model"], old["model"]) and len(metrics("run", "val")) == 5
    for folder in ("out", "run"):  # a folder without a run is no obstacle
        Path("empty", folder).mkdir(parents=True)
        assert main(f"empty/{folder}", max_iters=2) == 0


def test_what_overwrite_throws_away_is_thrown_away_only_by_a_run_that_starts(main):
    assert main("run") == 0
    refused(main, "too few for one window", "run", "--overwrite", block_size=100_000)


def test_data_that_are_not_as_they_should_be(main, corpus, tmp_path):
    def broken(name, change):
        folder = tmp_path / name / "mini" / "byte"
        shutil.copytree(corpus / "mini" / "byte", folder)
        change(folder)
        return tmp_path / name

    def cut(folder):
        os.truncate(folder / "train.bin", 999)

    def strange(folder):
        ids = np.fromfile(folder / "train.bin", "<u2")
        ids[100] = 300
        ids.tofile(folder / "train.bin")

    def other(folder):
        meta = json.loads((folder / "meta.json").read_text())
        meta["tokenizer"]["sha256"] = "0" * 64
        (folder / "meta.json").write_text(json.dumps(meta))

    def shrunk(folder):
        os.truncate(folder / "val.bin", 10)

    for change, said in {
        cut: "train.bin .*python prepare.py mini",
        strange: "300.*python prepare.py mini",
        other: "vocabulary.*python prepare.py mini",
        shrunk: "val.bin .*prepare.py mini",
    }.items():
        place = broken(change.__name__, change)
        refused(main, said, "run", data_dir=place)


def test_a_validation_file_shorter_than_one_window_works(main):
    assert main("run", block_size=600, eval_tokens=0, batch_size=2, max_iters=2) == 0
    assert metrics("run", "val")[-1]["bpb"] > 1


def test_more_stories_than_were_prepared(main, corpus, tmp_path):
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


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(main):
    assert main("straight") == 0
    assert main("run", stop_after=18) == 143
    os.truncate("run/latest.pt", 5000)
    assert main("run", "--resume") == 0
    assert "WARNING: run/latest.pt is damaged" in main.stderr and "at step 15" in main.stderr
    assert metrics("run") == metrics("straight") and bit_equal(run_state("run"), run_state("straight"))
    for name in ("latest", "previous"):
        os.truncate(f"run/{name}.pt", 5000)
    refused(main, "no checkpoint in run is whole", "run", "--resume")


def test_a_disk_that_is_too_small_is_noticed_before_the_first_step(main, monkeypatch):
    usage = shutil.disk_usage(".")._replace(free=10_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    assert main("run") == 1
    assert (
        "has 0 MB left" in main.stderr
        and "Traceback" not in main.stderr
        and not Path("run/metrics.jsonl").exists()
    )


# ----------------------------------------------------------------------------------------------------------
# Names, plans, notes


def test_runs_without_out_dir_get_folders_of_their_own(main):
    micro = write_recipe("micro", max_iters=2)
    for name in ("micro", "micro-2", "micro-3"):
        assert main("", micro, micro=False) == 0
        assert f"run      out/{name}\n" in main.stderr and Path("out", name, "latest.pt").is_file()
    assert main("", micro, "--resume", micro=False, max_iters=4) == 0 and "out/micro-3" in main.stderr
    assert len(list(Path("out").iterdir())) == 3


def test_resume_takes_the_newest_unfinished_run_of_this_recipe(main):
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


def test_a_run_that_its_patience_ended_is_finished(main):
    """Unless it is given more of it, then it goes on as if it had had that from the start."""
    micro = write_recipe("micro", eval_interval=2, learning_rate=0.5)
    assert main("", micro, micro=False, patience=2) == 0
    ended = run_state("out/micro")["step"]
    assert ended < 24
    refused(main, "nothing to resume: no unfinished run out/micro", "", micro, "--resume", micro=False)
    assert main("", micro, "--resume", micro=False, patience=0) == 0 and f"at step {ended}" in main.stderr
    assert main("", micro, micro=False) == 0 and "out/micro-2" in main.stderr
    assert metrics("out/micro") == metrics("out/micro-2") and metrics("out/micro")[-1]["step"] == 24


def test_no_steps_print_the_plan(main):
    refused_before = contents(".")
    assert (
        main("", write_recipe("micro", max_iters=50, gradient_accumulation_steps=2), micro=False, max_iters=0)
        == 0
    )
    for said in (
        "parameters",
        "8 rows x 16 = 128 tokens a step",
        "50 steps",
        "epochs",
        "MB of memory",
        "MB of disk",
    ):
        assert said in main.stderr
    assert not Path("out").exists() and contents(".").keys() - refused_before.keys() == {"micro.py"}


def test_a_warmup_longer_than_the_run_is_cut_with_a_note(main):
    assert main("run", warmup_iters=100, max_iters=10, log_interval=1) == 0
    assert "warmup_iters=100 is cut to 5" in main.stderr
    assert max(line["lr"] for line in metrics("run", "train")) == pytest.approx(0.01)
    assert main("", warmup_iters=10, max_iters=10) == 0 and "warmup_iters=10 is cut to 5" in main.stderr
    assert main("", warmup_iters=9, max_iters=10) == 0 and "is cut" not in main.stderr


# ----------------------------------------------------------------------------------------------------------
# Going on with other settings


def test_free_settings_are_taken_and_listed(main):
    assert main("run", stop_after=4) == 143
    free = dict(
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
    assert main("run", "--resume", micro=False, **free) == 0
    for name in free.keys() - {"threads"}:
        assert f"changed for the rest of the run: {name}: " in main.stderr
    assert "threads" not in main.stderr, "it did not change"
    config = checkpoint.read("run/latest.pt")["train_config"]
    assert all((config | config["model"])[name] == value for name, value in free.items())


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
def test_settings_that_make_another_run_are_refused_by_name(name, value, main):
    assert main("run", stop_after=4) == 143
    refused(
        main, f"cannot change on resume: {name}.*--override", "run", "--resume", micro=False, **{name: value}
    )
    status = main("run", "--resume", "--override", micro=False, **{name: value})
    if name in ("n_embd", "optimizer"):
        assert status == 2 and "the checkpoint does not fit these settings" in main.stderr
    else:
        assert status == 0 and f"{name}: " in main.stderr and metrics("run")[-1]["step"] == 24


def test_a_recipe_that_was_edited_between(main):
    write_recipe("micro", dropout=0.1)
    assert main("", "micro.py", micro=False, stop_after=4, learning_rate=0.005) == 143
    write_recipe("micro", dropout=0.1, eval_interval=2)
    assert main("", "micro.py", "--resume", micro=False, stop_after=6) == 143
    assert "eval_interval: 6 -> 2" in main.stderr, "what was edited is taken"
    assert "learning_rate" not in main.stderr, "what the command line said still holds"
    write_recipe("micro", dropout=0.2, eval_interval=2)
    refused(main, "dropout: 0.1 -> 0.2", "", "micro.py", "--resume", micro=False)
    Path("micro.py").write_text(re.sub("dropout.*", "", Path("micro.py").read_text()))
    refused(main, "dropout: 0.1 -> 0.0", "", "micro.py", "--resume", micro=False)
    write_recipe("micro", dropout=0.1, eval_interval=2)
    assert main("out/micro", "--resume", micro=False, stop_after=8) == 143, "and without the recipe"
    assert main("", "micro.py", "--resume", micro=False) == 0
    assert metrics("out/micro", "train")[-1]["step"] == 24
    assert checkpoint.read("out/micro/latest.pt")["train_config"]["learning_rate"] == 0.005


def test_changed_code_is_said(main):
    assert main("run", stop_after=4) == 143
    state = checkpoint.read("run/latest.pt")
    state["provenance"]["model.py"] = "something else"
    checkpoint.save("run/latest.pt", state)
    assert main("run", "--resume") == 0
    assert "model.py was changed since" in main.stderr and "train.py was changed" not in main.stderr


def test_bins_that_changed_under_a_run_are_refused(main, corpus, tmp_path):
    place = tmp_path / "mine"
    shutil.copytree(corpus, place)
    assert main("run", data_dir=place, stop_after=4) == 143
    file = place / "mini" / "byte" / "train.bin"
    ids = np.fromfile(file, "<u2")
    ids[1000] ^= 1
    ids.tofile(file)
    refused(main, "are not those that this run began with", "run", "--resume", data_dir=place)
    ids[1000] ^= 1
    ids.tofile(file)
    assert main("run", "--resume", data_dir=place) == 0


def test_the_first_stories_of_more_that_are_prepared(main, corpus, tmp_path):
    """A run on them equals a run where no others are prepared, and it can be resumed when others are."""
    texts = (corpus.parent / "mini.txt").read_text().split("\n\n")
    for name, part in (("train", texts[:30]), ("validation", texts[30:])):
        (tmp_path / "source").mkdir(exist_ok=True)
        (tmp_path / "source" / f"{name}.txt").write_text("\n\n".join(part))
    made = dict(source=str(tmp_path / "source"), data_dir=tmp_path / "data")
    prepare.prepare("mini", "byte", stories=10, **made)
    assert main("few", data_dir=tmp_path / "data", stories=10) == 0
    assert main("run", data_dir=tmp_path / "data", stories=10, stop_after=4) == 143
    prepare.prepare("mini", "byte", **made)
    assert main("run", "--resume", micro=False, data_dir=tmp_path / "data") == 0
    assert main("many", data_dir=tmp_path / "data", stories=10) == 0 and ": 10 stories, " in main.stderr
    for other in ("run", "many"):
        assert metrics("few") == metrics(other) and bit_equal(run_state("few"), run_state(other))
    assert main("all", data_dir=tmp_path / "data") == 0 and ": 30 stories, " in main.stderr
    assert metrics("all") != metrics("few")


def test_the_number_of_stories_cannot_change_on_resume(main, corpus, tmp_path):
    assert main("run", stories=10, stop_after=4) == 143
    for n in (9, 30, 0):
        said = f"cannot change on resume: stories: 10 -> {n}"
        refused(main, said, "run", "--resume", micro=False, stories=n)
    refused(main, "not those that this run", "run", "--resume", "--override", micro=False, stories=9)


def test_the_fallback_has_as_many_stories(main, tmp_path):
    """HF_HUB_OFFLINE is set in all tests."""
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
# Signals, kills, two runs at once


LONG = dict(
    max_iters=100_000, eval_interval=50_000, save_interval=50_000, schedule="constant", log_interval=1
)


@posix
@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)], ids=str)
def test_a_signal_saves_within_one_step(number, status, tmp_path, corpus, main):
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
def test_a_signal_before_the_first_step(when, number, status, tmp_path, corpus):
    changes = dict(dataset="mine", source=corpus.parent / "mini.txt", data_dir="data", compile="True")
    run = Program(cli_args(corpus, **changes, out_dir="run"), tmp_path, hook=(slow_start, when))
    run.until("busy now")
    run.signal(signal.SIGUSR1)
    time.sleep(0.2)
    assert run.process.is_alive(), "there is nothing to save yet, and no reason to die"
    run.signal(number)
    assert run.wait(10) == status
    name = signal.Signals(number).name
    assert run.text.splitlines()[-1] == f"{name}: ended, with no update lost" and "Traceback" not in run.text
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    made = {f"data/mine/byte/{name}" for name in ("train.bin", "val.bin", "meta.json")}
    made |= {"run/lock", "run/metrics.jsonl", "run/config.json"}
    assert left - {run.output.name} == (made if when == "compiling" else set())


def slow_start(when: str) -> None:
    """Preparing the data or compiling takes a minute."""

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
def test_sigusr1_saves_and_goes_on(tmp_path, corpus):
    run = Program(cli_args(corpus, out_dir="run", **LONG), tmp_path)
    run.until("step      1")
    run.signal(signal.SIGUSR1)
    end = time.monotonic() + 30
    while not (tmp_path / "run/latest.pt").exists() and time.monotonic() < end:
        time.sleep(0.01)
    saved = run_state(tmp_path / "run")["step"]
    while lines_so_far(tmp_path / "run")[-1]["step"] < saved + 5 and time.monotonic() < end:
        time.sleep(0.01)
    assert lines_so_far(tmp_path / "run")[-1]["step"] >= saved + 5
    run.kill()


def lines_so_far(folder) -> list[dict]:
    return runs.read_metrics(Path(folder))


@posix
def test_a_second_ctrl_c_leaves_at_once_and_hurts_nothing(tmp_path, corpus, main):
    run = Program(
        cli_args(corpus, out_dir="run", **LONG | dict(save_interval=5)), tmp_path, hook=(slow_saves, 30)
    )
    run.until("saving now")
    run.signal(signal.SIGINT)
    run.until("once more ends at once")
    run.signal(signal.SIGINT)
    assert run.wait(10) == -signal.SIGINT
    assert main("run", "--resume", **LONG | dict(max_iters=12)) == 0
    assert "starts again at step 0" in main.stderr and not list(Path("run").glob("*.tmp"))


def slow_saves(seconds: float) -> None:
    """Each save takes its time between the writing and the renaming."""
    real = hashlib.file_digest

    def file_digest(*args):
        print("saving now", file=sys.stderr, flush=True)
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            time.sleep(0.01)
        return real(*args)

    hashlib.file_digest = file_digest


@posix
def test_two_runs_on_one_out_dir(tmp_path, corpus, main):
    """The second is refused while the first lives, and the lock does not outlive a kill -9."""
    run = Program(cli_args(corpus, out_dir="run", **LONG | dict(save_interval=5)), tmp_path)
    run.until("step      1")
    while not Path("run/previous.pt").exists():
        time.sleep(0.01)
    for flag in ("--resume", "--overwrite"):
        assert main("run", flag, **LONG) == 2 and "another run is writing to run" in main.stderr
    assert run.process.is_alive()
    run.kill()
    step = runs.last_state(Path("run"))["step"]  # the kill may strike between the two renames of a save
    assert step >= 10
    assert main("run", "--resume", micro=False, max_iters=step + 2) == 0
    assert f"at step {step:,}" in main.stderr


@posix
def test_killed_before_the_first_save(tmp_path, corpus, main):
    run = Program(cli_args(corpus, out_dir="run", **LONG), tmp_path)
    run.until("step      1")
    run.kill()
    assert main("run", "--resume", **LONG | dict(max_iters=10)) == 0
    assert "ended before its first checkpoint: it starts again at step 0" in main.stderr
    assert main("straight", **LONG | dict(max_iters=10)) == 0
    assert metrics("run") == metrics("straight")


# ----------------------------------------------------------------------------------------------------------
# Several processes


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def ranks(world: int, argv: list[str], folder, hooks: dict | None = None) -> list[Program]:
    """The processes that torchrun would start."""
    env = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [
        Program(argv, folder, env | {"RANK": str(r), "LOCAL_RANK": str(r)}, (hooks or {}).get(r, ()))
        for r in range(world)
    ]


def keep_gradients(file: str) -> None:
    """Save the gradient of the first update, after it was summed over processes, before it is clipped."""
    update = train.Trainer.update

    def spy(self, step, loss, norm):
        if step == 0:
            torch.save([p.grad for p in self.model.parameters()], file)
        update(self, step, loss, norm)

    train.Trainer.update = spy


@posix
@pytest.mark.parametrize("accumulation", [2, 1], ids=["by micro-batches", "by rows"])
def test_two_processes_are_the_same_run(accumulation, tmp_path, corpus):
    """Also with another number of processes in the middle of it."""
    changes = dict(gradient_accumulation_steps=accumulation, grad_clip=0.0, log_interval=1, max_iters=12)
    one = Program(cli_args(corpus, out_dir="one", **changes), tmp_path, hook=(keep_gradients, "one.pt"))
    two = ranks(2, cli_args(corpus, out_dir="two", **changes), tmp_path, {0: (keep_gradients, "two.pt")})
    assert [p.wait() for p in (one, *two)] == [0, 0, 0], two[0].text + two[1].text
    assert max_difference(torch.load(tmp_path / "one.pt"), torch.load(tmp_path / "two.pt")) < 1e-6
    a, b = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    assert [(x["step"], x["split"], x["tokens"]) for x in a] == [
        (x["step"], x["split"], x["tokens"]) for x in b
    ]
    assert [x["loss"] for x in a] == pytest.approx([x["loss"] for x in b], rel=1e-4)
    assert [x["bpb"] for x in a if "bpb" in x] == pytest.approx([x["bpb"] for x in b if "bpb" in x], rel=1e-4)
    assert two[1].text == "", "one process speaks and writes"
    more = cli_args(corpus, out_dir="two", **changes | dict(max_iters=14)) + ["--resume"]
    assert Program(more, tmp_path).wait() == 0 and metrics(tmp_path / "two")[-1]["step"] == 14


@posix
def test_resuming_two_processes_is_exact(tmp_path, corpus):
    """A stop that only one process was asked for rides on the all-reduce; the rest is the same to the bit."""
    changes = dict(gradient_accumulation_steps=2, dropout=0.1, log_interval=1, save_interval=7)
    straight = ranks(2, cli_args(corpus, out_dir="straight", **changes), tmp_path)
    stopped = ranks(2, cli_args(corpus, out_dir="stopped", **changes), tmp_path, {1: (ask, 9)})
    assert [p.wait() for p in (*straight, *stopped)] == [0, 0, 143, 143], stopped[0].text
    assert run_state(tmp_path / "stopped")["step"] == 9
    again = ranks(2, cli_args(corpus, out_dir="stopped", **changes) + ["--resume"], tmp_path)
    assert [p.wait() for p in again] == [0, 0], again[0].text
    assert metrics(tmp_path / "stopped") == metrics(tmp_path / "straight")
    assert bit_equal(run_state(tmp_path / "stopped"), run_state(tmp_path / "straight"))


def ask(after: int) -> None:
    """SIGTERM in update `after`."""
    step = train.Trainer.train_step

    def train_step(self, n):
        if n + 1 == after:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, n)

    train.Trainer.train_step = train_step


@posix
@pytest.mark.parametrize("dies", [0, 1])
def test_a_rank_that_dies_stops_the_other(dies, tmp_path, corpus):
    """Within seconds, with the reason and no half save; and the run goes on."""
    changes = dict(gradient_accumulation_steps=2, log_interval=1)
    pair = ranks(2, cli_args(corpus, out_dir="run", **changes), tmp_path, {dies: (die, 13)})
    assert pair[dies].wait() == -signal.SIGKILL
    assert pair[1 - dies].wait(10) == 1
    said = pair[1 - dies].text
    assert "error: another process of this run is gone" in said and "Traceback" not in said
    assert run_state(tmp_path / "run")["step"] == 10 and not list((tmp_path / "run").glob("*.tmp"))
    again = ranks(2, cli_args(corpus, out_dir="run", **changes) + ["--resume"], tmp_path)
    straight = ranks(2, cli_args(corpus, out_dir="straight", **changes), tmp_path)
    assert [p.wait() for p in (*again, *straight)] == [0] * 4
    assert metrics(tmp_path / "run") == metrics(tmp_path / "straight")
    assert bit_equal(run_state(tmp_path / "run"), run_state(tmp_path / "straight"))


def die(after: int) -> None:
    """kill -9 in update `after`."""
    step = train.Trainer.train_step

    def train_step(self, n):
        if n + 1 == after:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(self, n)

    train.Trainer.train_step = train_step


@posix
def test_processes_that_divide_nothing(tmp_path, corpus):
    trio = ranks(3, cli_args(corpus, out_dir="run", batch_size=4), tmp_path)
    assert [p.wait() for p in trio] == [2, 2, 2]
    assert "3 processes divide neither" in trio[0].text and not (tmp_path / "run").exists()


@pytest.mark.slow
@posix
def test_torchrun(tmp_path, corpus):
    """The real torchrun: two processes to the end, and a SIGTERM on the way that saves."""

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
        quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        return subprocess.Popen(argv, cwd=tmp_path, **quiet)

    changes = dict(gradient_accumulation_steps=2, log_interval=1, out_dir="run")
    run = torchrun(**LONG | changes)
    end = time.monotonic() + 120
    while len(lines_so_far(tmp_path / "run")) < 10 and time.monotonic() < end:
        time.sleep(0.1)
    run.send_signal(signal.SIGTERM)
    said = run.communicate(timeout=60)[1]
    assert "saved at step" in said and run.returncode != 0
    step = run_state(tmp_path / "run")["step"]
    assert step == metrics(tmp_path / "run")[-1]["step"]
    run = torchrun("--resume", **LONG | changes | dict(max_iters=step + 3))
    said = run.communicate(timeout=120)[1]
    assert run.returncode == 0 and f"at step {step:,}" in said, said
