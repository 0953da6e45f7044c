"""
Fault injection: a micro run is killed at every stage, its files are damaged, its disk fails. It resumes, and
the result must be bitwise equal to that of an uninterrupted run.

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

STAGES = {  # stage -> n: kill -9 happens when the process reaches it for the 1st to n-th time
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
OTHER_FAULTS = {
    "kill -9 at a random moment": "kill",
    "SIGTERM at a random moment": signal.SIGTERM,
    "SIGINT at a random moment": signal.SIGINT,
    "kill -9, and a bit of latest.pt flips": "flip",
    "kill -9, and latest.pt is cut": "cut",
    "disk full at one save": "full",
}


# ----------------------------------------------------------------------------------------------------------
# In the training process


def die(*args, **kwargs) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def inject(stage: str, n: int) -> None:
    """Make this process kill itself when it reaches `stage` for the n-th time."""
    saving, left = [None], [n]  # the file that is being saved; how often the stage is still to be reached

    def reached() -> bool:
        left[0] -= 1
        return left[0] == 0

    def wrap(module, name: str, condition=lambda *args: True, action=die) -> None:
        real = getattr(module, name)

        def wrapper(*args, **kwargs):
            if condition(*args) and reached():
                action(*args, **kwargs)
            return real(*args, **kwargs)

        setattr(module, name, wrapper)

    save = runs.RunDirectory.save

    def save_and_record(self, name, *args, **kwargs):
        saving[0] = name
        save(self, name, *args, **kwargs)
        saving[0] = None

    def write_half(content, file, **kwargs):
        buffer = io.BytesIO()
        torch_save(content, buffer)
        file.write(buffer.getvalue()[: buffer.tell() // 2])
        file.flush()
        die()

    class HalfLine(io.TextIOWrapper):
        def write(self, text):
            if reached():
                super().write(text[: len(text) // 2])
                self.flush()
                die()
            return super().write(text)

    runs.RunDirectory.save, torch_save = save_and_record, torch.save
    name = next((word for word in stage.split() if word.endswith(".pt")), "latest.pt")
    match stage.split():
        case ["setting", *_]:
            wrap(runs.RunDirectory, "cut_back")
        case ["an", "update"]:
            wrap(train.Trainer, "update")
        case ["an", "evaluation"]:
            wrap(score, "bits_per_byte")
        case ["a", "line", *_]:
            runs.open = lambda file, mode, encoding: HalfLine(open(file, mode + "b"), encoding)
        case ["cutting", *_]:
            wrap(os, "replace", lambda old, new: Path(new).name == "metrics.jsonl")
        case ["writing", _]:
            wrap(torch, "save", lambda *args: saving[0] == name, write_half)
        case ["syncing", _]:
            wrap(os, "fsync", lambda handle: saving[0] == name)
        case ["renaming", _, "to", _]:
            wrap(os, "replace", lambda old, new: Path(new).name == "previous.pt")
        case ["between", *_]:
            wrap(os, "replace", lambda old, new: Path(new).name == "latest.pt")
        case ["after", *_]:
            wrap(checkpoint, "sync_folder", lambda folder: saving[0] == "latest.pt")
        case ["renaming", _]:
            wrap(os, "replace", lambda old, new: Path(new).name == name)
        case ["disk", "full", *_]:
            real = os.fsync

            def full(handle):
                if saving[0] and reached():
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                real(handle)

            os.fsync, time.sleep = full, lambda seconds: None
        case _:
            raise ValueError(stage)


# ----------------------------------------------------------------------------------------------------------
# In the test process


class Harness:
    """Runs with faults, and a table of the results."""

    def __init__(self, tmp_path: Path, corpus: Path, seed: int):
        self.root, self.argv, self.rng = tmp_path, cli_args(corpus, **RUN), random.Random(seed)
        self.table: dict[str, list[int]] = {}  # fault -> injected, survived, lost, most repeated updates
        self.damaged = b""  # the damaged content of latest.pt
        for name in ("warm-up", "straight"):  # the warm-up starts the fork server
            began, self.straight = time.monotonic(), self.folder(name)
            assert Program(self.argv, self.straight.parent).wait() == 0
            self.seconds = time.monotonic() - began

    def folder(self, name: str) -> Path:
        (self.root / name).mkdir()
        return self.root / name / "run"

    def start(self, folder: Path, fault: str | None) -> tuple[bool, int]:
        """
        Start or resume the run with one fault. -> (whether it is finished, number of repeated updates).
        """
        latest = folder / "latest.pt"
        if latest.exists() and latest.read_bytes() != self.damaged:
            self.damaged = b""  # it has been replaced
        max_lost = 2 * INTERVAL if self.damaged else INTERVAL
        done = max((x["step"] for x in runs.read_metrics(folder) if x["split"] == "train"), default=0)
        saved = (folder / "latest.pt").exists() or (folder / "previous.pt").exists()
        begun = (folder / "metrics.jsonl").exists()
        action = OTHER_FAULTS.get(fault)
        hook = (inject, fault, self.rng.randint(1, STAGES[fault])) if fault in STAGES else ()
        hook = (inject, fault, self.rng.randint(1, 12)) if action == "full" else hook
        run = Program(self.argv + ["--resume"] * begun, folder.parent, hook=hook)
        if action and action != "full":
            while not run.output.exists():
                time.sleep(0.001)
            run.process.join(self.rng.uniform(0, self.seconds))
            if run.process.exitcode is None:
                run.signal(action if isinstance(action, signal.Signals) else signal.SIGKILL)
        status = run.wait(120)
        expected = (0, 130, 143, -signal.SIGKILL, -signal.SIGTERM, -signal.SIGINT)
        assert status in expected, f"status {status} after {fault}:\n{run.text}"
        assert "Traceback" not in run.text or "KeyboardInterrupt" in run.text, run.text
        resumed = re.search(r"resuming run at step (\d+)", run.text)
        lost = done - int(resumed[1]) if resumed else 0
        if begun and not saved and status != -signal.SIGKILL:
            assert "starting at step 0" in run.text or action, run.text
        assert lost <= max_lost, f"{lost} updates were lost after {fault}:\n{run.text}"
        return status == 0, lost

    def run_with_faults(self, name: str, faults: list[str]) -> None:
        """One run, interrupted by these faults in turn and then finished."""
        folder, injected, self.damaged = self.folder(name), [], b""
        for fault in faults:
            finished, lost = self.start(folder, fault)
            self.record(injected, lost)
            if finished and fault != "disk full at one save":
                break  # the run finished before the fault occurred
            injected.append(fault)
            if OTHER_FAULTS.get(fault) in ("flip", "cut") and (folder / "previous.pt").exists():
                self.damage(folder / "latest.pt", OTHER_FAULTS[fault])
            if finished:
                break
        else:
            finished, lost = self.start(folder, None)
            self.record(injected, lost)
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

    def record(self, injected: list[str], lost: int) -> None:
        if injected:
            row = self.table.setdefault(injected[-1], [0, 0, 0, 0])
            row[3] = max(row[3], lost)

    def damage(self, file: Path, kind: str) -> None:
        if not file.exists():
            return
        content = bytearray(file.read_bytes())
        position = self.rng.randrange(len(content))
        if kind == "cut":
            del content[position:]
        else:
            content[position] ^= 1 << self.rng.randrange(8)
        file.write_bytes(content)
        self.damaged = bytes(content)

    def print(self) -> None:
        order = {name: i for i, name in enumerate([*STAGES, *OTHER_FAULTS])}
        rows = sorted(self.table.items(), key=lambda row: order[row[0]])
        total = [sum(row[i] for _, row in rows) for i in range(3)] + [max(row[3] for _, row in rows)]
        print("\n| fault | times injected | survived | lost | most repeated updates |")
        print("|---|---:|---:|---:|---:|")
        for fault, row in [*rows, ("all", total)]:
            name = f"kill -9 at: {fault}" if fault in STAGES else fault
            print(f"| {name} | " + " | ".join(map(str, row)) + " |")
        sys.stdout.flush()

    def check(self) -> None:
        assert all(row[2] == 0 for row in self.table.values()), self.table


def test_kill_at_every_stage(tmp_path, corpus):
    """One kill at each stage: the short version of test_faults."""
    harness = Harness(tmp_path, corpus, seed=1)
    stages = list(STAGES)
    for i in range(3):
        harness.run_with_faults(f"run-{i}", stages[i::3])
    harness.check()
    assert sum(row[0] for row in harness.table.values()) >= 9


@pytest.mark.slow
def test_faults(tmp_path, corpus):
    """At least 100 kills, reproducible except for those at random moments."""
    harness, i = Harness(tmp_path, corpus, seed=0), 0
    wanted = dict.fromkeys(STAGES, 8) | dict.fromkeys(OTHER_FAULTS, 8) | {"kill -9 at a random moment": 30}

    def missing():
        return [fault for fault in wanted for _ in range(wanted[fault] - harness.table.get(fault, [0])[0])]

    while faults := missing():
        harness.run_with_faults(f"run-{i}", harness.rng.sample(faults, min(4, len(faults))))
        i += 1
        assert i < 400, f"{harness.table}"
    harness.print()
    harness.check()
    kills = sum(row[0] for fault, row in harness.table.items() if "SIG" not in fault and "full" not in fault)
    assert kills >= 100
