"""
Faults, injected on purpose: a micro run is killed at every stage of its life, its files are damaged, its disk
fails; it resumes, and what it finishes with must be bit-equal to a run that nothing happened to.

    pytest -m slow -n 0 -s tests/test_faults.py      # about 200 faults, a few minutes; prints the table
"""

import errno
import io
import os
import random
import re
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import Program, bit_equal, cli_args, metrics, run_state

import train
from nanostlm import checkpoint, runs, score

pytestmark = pytest.mark.skipif(os.name == "nt", reason="kill -9 is POSIX")

INTERVAL = 4  # updates between checkpoints
RUN = dict(
    max_iters=30,
    save_interval=INTERVAL,
    eval_interval=3,
    log_interval=1,
    dropout=0.1,
    gradient_accumulation_steps=2,
    optimizer="muon",
    dtype="float16",
    schedule="wsd",
    patience=100,
    out_dir="run",
)

STAGES = {  # where kill -9 strikes: at a call of what is named here, from the 1st to the n-th in that process
    "setting up": 1,
    "an update": 12,
    "an evaluation": 6,
    "a line of metrics, half written": 15,
    "cutting metrics back on a resume": 1,
    "writing latest.pt": 3,
    "syncing latest.pt": 4,  # or the lines of metrics before it
    "renaming latest.pt to previous.pt": 2,
    "between the two renames": 3,
    "after the renames": 3,
    "writing best.pt": 4,
    "renaming best.pt": 4,
}
OTHERS = {
    "kill -9 at a random moment": "kill",
    "SIGTERM at a random moment": signal.SIGTERM,
    "SIGINT at a random moment": signal.SIGINT,
    "kill -9, and a bit of latest.pt flips": "flip",
    "kill -9, and latest.pt is cut": "cut",
    "disk full at one save": "full",
}


# ----------------------------------------------------------------------------------------------------------
# In the process that is to die


def die(*args, **kwargs) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def inject(stage: str, n: int) -> None:
    """Arrange for this process to be killed at its n-th arrival at `stage`."""
    saving, left = [None], [n]  # the file that is being saved; arrivals still to come

    def arrived() -> bool:
        left[0] -= 1
        return left[0] == 0

    def before(module, name: str, applies=lambda *args: True, instead=die) -> None:
        real = getattr(module, name)

        def wrapped(*args, **kwargs):
            if applies(*args) and arrived():
                instead(*args, **kwargs)
            return real(*args, **kwargs)

        setattr(module, name, wrapped)

    save = runs.RunDirectory.save

    def spying_save(self, name, *args, **kwargs):
        saving[0] = name
        save(self, name, *args, **kwargs)
        saving[0] = None

    def half_written(content, file, **kwargs):
        whole = io.BytesIO()
        torch_save(content, whole)
        file.write(whole.getvalue()[: whole.tell() // 2])
        file.flush()
        die()

    class HalfLine(io.TextIOWrapper):
        def write(self, text):
            if arrived():
                super().write(text[: len(text) // 2])
                self.flush()
                die()
            return super().write(text)

    runs.RunDirectory.save, torch_save = spying_save, torch.save
    name = next((word for word in stage.split() if word.endswith(".pt")), "latest.pt")
    match stage.split():
        case ["setting", *_]:
            before(runs.RunDirectory, "cut_back")
        case ["an", "update"]:
            before(train.Trainer, "update")
        case ["an", "evaluation"]:
            before(score, "bits_per_byte")
        case ["a", "line", *_]:
            runs.open = lambda file, mode, encoding: HalfLine(open(file, mode + "b"), encoding)
        case ["cutting", *_]:
            before(os, "replace", lambda old, new: Path(new).name == "metrics.jsonl")
        case ["writing", _]:
            before(torch, "save", lambda *args: saving[0] == name, half_written)
        case ["syncing", _]:
            before(os, "fsync", lambda handle: saving[0] == name)
        case ["renaming", _, "to", _]:
            before(os, "replace", lambda old, new: Path(new).name == "previous.pt")
        case ["between", *_]:
            before(os, "replace", lambda old, new: Path(new).name == "latest.pt")
        case ["after", *_]:
            before(checkpoint, "sync_folder", lambda folder: saving[0] == "latest.pt")
        case ["renaming", _]:
            before(os, "replace", lambda old, new: Path(new).name == name)
        case ["disk", "full", *_]:
            real = os.fsync

            def full(handle):
                if saving[0] and arrived():
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                real(handle)

            os.fsync, time.sleep = full, lambda seconds: None
        case _:
            raise ValueError(stage)


# ----------------------------------------------------------------------------------------------------------
# In the process that watches


class Watch:
    """Runs with faults, and what came of them."""

    def __init__(self, tmp_path: Path, corpus: Path, seed: int):
        self.root, self.argv, self.draw = tmp_path, cli_args(corpus, **RUN), random.Random(seed)
        self.table: dict[str, list[int]] = {}  # fault -> injected, survived, lost, most updates made again
        self.damaged = b""  # what latest.pt was turned into
        for name in ("warm-up", "straight"):  # the first one waits for the fork server to start
            began, self.straight = time.monotonic(), self.folder(name)
            assert Program(self.argv, self.straight.parent).wait() == 0
            self.seconds = time.monotonic() - began

    def folder(self, name: str) -> Path:
        (self.root / name).mkdir()
        return self.root / name / "run"

    def once(self, folder: Path, fault: str | None) -> tuple[bool, int]:
        """
        Start or resume the run, with one fault on the way. -> (whether it is finished, updates that the start
        had to make again).
        """
        latest = folder / "latest.pt"
        if latest.exists() and latest.read_bytes() != self.damaged:
            self.damaged = b""  # there is a newer one
        allowed = 2 * INTERVAL if self.damaged else INTERVAL
        done = max((x["step"] for x in runs.read_metrics(folder) if x["split"] == "train"), default=0)
        saved = (folder / "latest.pt").exists() or (folder / "previous.pt").exists()
        begun = (folder / "metrics.jsonl").exists()
        how = OTHERS.get(fault)
        hook = (inject, fault, self.draw.randint(1, STAGES[fault])) if fault in STAGES else ()
        hook = (inject, fault, self.draw.randint(1, 12)) if how == "full" else hook
        run = Program(self.argv + ["--resume"] * begun, folder.parent, hook=hook)
        if how and how != "full":
            while not run.output.exists():
                time.sleep(0.001)
            run.process.join(self.draw.uniform(0, self.seconds))
            if run.process.exitcode is None:
                run.signal(how if isinstance(how, signal.Signals) else signal.SIGKILL)
        status = run.wait(120)
        fine = (0, 130, 143, -signal.SIGKILL, -signal.SIGTERM, -signal.SIGINT)
        assert status in fine, f"status {status} after {fault}:\n{run.text}"
        assert "Traceback" not in run.text or "KeyboardInterrupt" in run.text, run.text
        said = re.search(r"resuming run at step (\d+)", run.text)
        lost = done - int(said[1]) if said else 0
        if begun and not saved and status != -signal.SIGKILL:
            assert "starts again at step 0" in run.text or how, run.text
        assert lost <= allowed, f"{lost} updates were lost after {fault}:\n{run.text}"
        return status == 0, lost

    def disturb(self, name: str, faults: list[str]) -> None:
        """One run with these faults, one after the other, and then to its end."""
        folder, injected, self.damaged = self.folder(name), [], b""
        for fault in faults:
            finished, lost = self.once(folder, fault)
            self.note(injected, lost)
            if finished and fault != "disk full at one save":
                break  # it was over before the fault could strike
            injected.append(fault)
            if OTHERS.get(fault) in ("flip", "cut") and (folder / "previous.pt").exists():
                self.damage(folder / "latest.pt", OTHERS[fault])
            if finished:
                break
        else:
            finished, lost = self.once(folder, None)
            self.note(injected, lost)
        assert finished
        equal = metrics(folder) == metrics(self.straight) and bit_equal(
            run_state(folder), run_state(self.straight)
        )
        equal = equal and bit_equal(run_state(folder, "best.pt"), run_state(self.straight, "best.pt"))
        equal = equal and not list(folder.glob("*.tmp"))
        for fault in injected:
            self.table.setdefault(fault, [0, 0, 0, 0])
            self.table[fault][0] += 1
            self.table[fault][1 if equal else 2] += 1

    def note(self, injected: list[str], lost: int) -> None:
        if injected:
            row = self.table.setdefault(injected[-1], [0, 0, 0, 0])
            row[3] = max(row[3], lost)

    def damage(self, file: Path, how: str) -> None:
        if not file.exists():
            return
        content = bytearray(file.read_bytes())
        place = self.draw.randrange(len(content))
        if how == "cut":
            del content[place:]
        else:
            content[place] ^= 1 << self.draw.randrange(8)
        file.write_bytes(content)
        self.damaged = bytes(content)

    def print(self) -> None:
        order = {name: i for i, name in enumerate([*STAGES, *OTHERS])}
        rows = sorted(self.table.items(), key=lambda row: order[row[0]])
        total = [sum(row[i] for _, row in rows) for i in range(3)] + [max(row[3] for _, row in rows)]
        print("\n| fault | times injected | survived | lost | most updates made again |")
        print("|---|---:|---:|---:|---:|")
        for fault, row in [*rows, ("all", total)]:
            name = f"kill -9 at: {fault}" if fault in STAGES else fault
            print(f"| {name} | " + " | ".join(map(str, row)) + " |")
        sys.stdout.flush()

    def check(self) -> None:
        assert all(row[2] == 0 for row in self.table.values()), self.table


def test_a_kill_at_every_stage(tmp_path, corpus):
    """One each, in one run after another: the short form of the harness below."""
    watch = Watch(tmp_path, corpus, seed=1)
    stages = list(STAGES)
    for i in range(3):
        watch.disturb(f"run-{i}", stages[i::3])
    watch.check()
    assert sum(row[0] for row in watch.table.values()) >= 9


@pytest.mark.slow
def test_faults(tmp_path, corpus):
    """At least 100 kills, repeatable but for the random moments."""
    watch, i = Watch(tmp_path, corpus, seed=0), 0
    wanted = dict.fromkeys(STAGES, 8) | dict.fromkeys(OTHERS, 8) | {"kill -9 at a random moment": 30}

    def missing():
        return [fault for fault in wanted for _ in range(wanted[fault] - watch.table.get(fault, [0])[0])]

    while faults := missing():
        watch.disturb(f"run-{i}", watch.draw.sample(faults, min(4, len(faults))))
        i += 1
        assert i < 400, f"{watch.table}"
    watch.print()
    watch.check()
    kills = sum(row[0] for fault, row in watch.table.items() if "SIG" not in fault and "full" not in fault)
    assert kills >= 100
