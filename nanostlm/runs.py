"""
A run's directory: latest.pt and previous.pt (full state), best.pt (weights), config.json, metrics.jsonl,
loss.png, lock.

    folder = new_folder("tiny")                      # out/tiny, or out/tiny-2, ...
    directory = RunDirectory(folder)
    with directory.claim(disk=10**8):                # one run per directory
        directory.log({"step": 1, ...})
        directory.save("latest.pt", state, previous="previous.pt")
"""

import contextlib
import itertools
import json
import math
import os
import re
import shlex
import shutil
import time
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout

from nanostlm import checkpoint
from nanostlm.machine import print0
from nanostlm.schema import COUNT, FINITE, FLAG, NONE, NUMBER, TEXT, TYPES, WHOLE, check, naming, read_json

ANY = "a setting", lambda x: type(x) in TYPES
LINE = {"step": WHOLE, "loss": NUMBER, "tokens": WHOLE, "elapsed_s": FINITE}
TRAIN = LINE | {"lr": FINITE, "grad_norm": NUMBER, "tokens_per_s": FINITE}
METRICS = {"train": TRAIN, "val": LINE | {"bpb": NUMBER}}  # by split
CHANGING = ("batch_size", "gradient_accumulation_steps", "eval_interval", "log_interval", "max_iters")
COUNTS = {"step": WHOLE, "evals_since_best": WHOLE, "skipped": WHOLE, "evaluated": TYPES[int]}
RESUME = {  # what a checkpoint of a run holds besides checkpoint.STATE
    "progress": COUNTS | {"best": NUMBER, "elapsed": FINITE, "joules?": NUMBER, "*": NONE},
    "optimizers": [{"state": {"*": {"*": checkpoint.TENSOR}}, "param_groups": [{"params": [WHOLE]}]}],
    **{"scaler": {"*": FINITE}, "data": {"*": [WHOLE]}, "compiled": FLAG, "machine": TEXT},
    "provenance": {"*": TEXT},
    "objective?": {},
}


@dataclass
class Progress:
    """The progress of a run, saved in checkpoints as a dict."""

    step: int = 0  # finished updates
    best: float = math.inf  # validation loss
    evals_since_best: int = 0
    evaluated: int = -1  # step of the last evaluation
    skipped: int = 0  # updates skipped because they were not finite
    elapsed: float = 0.0  # seconds, over all resumes
    joules: float = 0.0  # energy, over all resumes; nan if unknown

    def finished(self, max_iters: int, patience: int) -> bool:
        """Whether max_iters or patience ends the run."""
        return self.step >= max_iters or 0 < patience <= self.evals_since_best


class RunDirectory:
    """The files of one run. Metrics lines that could not be written are retried."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.waiting: list[str] = []  # lines of metrics not yet written

    @contextlib.contextmanager
    def claim(self, disk: int, state: dict | None = None, max_iters: int = 0):
        """
        Lock the directory, check that `disk` bytes are free, and remove files of an earlier run, except those
        that the checkpoint `state` continues. The operating system releases the lock when the process exits.
        """
        try:
            lock = FileLock(self.folder / "lock").acquire(timeout=0)
        except Timeout:
            raise ValueError(f"another run is writing to {self.folder}") from None
        with lock:
            free = shutil.disk_usage(self.folder).free
            if free < disk:
                need = f"checkpoints need {disk >> 20:,} MB"
                raise OSError(f"{need}; the disk of {self.folder} has {free >> 20:,} MB left")
            self.cut_back(state, max_iters)
            yield

    def cut_back(self, state: dict | None, max_iters: int) -> None:
        """Remove the files of an earlier run, and the lines of metrics after the step of `state`."""
        stale = () if state else ("latest.pt", "previous.pt", "best.pt", "loss.png")
        if state and state["file"] == "previous.pt":  # a damaged latest.pt must not become previous.pt
            stale = ("latest.pt",)
        leftovers = self.folder.glob("*.tmp")  # left by a process that was killed while saving
        for file in [*leftovers, *(self.folder / name for name in stale)]:
            file.unlink(missing_ok=True)
        lines = lines_until(state, read_metrics(self.folder), max_iters) if state else []
        self.waiting = [json.dumps(line) + "\n" for line in lines]
        self.flush("metrics.tmp", sync=True)
        os.replace(self.folder / "metrics.tmp", self.folder / "metrics.jsonl")

    def write_config(self, config: dict) -> None:
        """Write config.json, a description of the run for users and comparisons."""
        replace_text(self.folder / "config.json", json.dumps(config, indent=1) + "\n")

    def log(self, line: dict) -> None:
        """Append a line to metrics.jsonl; if that fails, warn and keep it for the next attempt."""
        self.waiting.append(json.dumps(line) + "\n")
        try:
            self.flush()
        except OSError as error:
            print0(
                f"WARNING: could not write metrics.jsonl at step {line['step']}: {error}; trying again later"
            )

    def flush(self, name: str = "metrics.jsonl", sync: bool = False) -> None:
        """Append all waiting lines to a file, or none and raise OSError. `sync`: also fsync."""
        path = self.folder / name
        size = path.stat().st_size if path.exists() else 0
        try:
            with open(path, "a", encoding="utf-8") as file:
                file.write("".join(self.waiting))
                if sync:
                    file.flush()
                    os.fsync(file.fileno())
        except OSError:
            with contextlib.suppress(OSError):
                os.truncate(path, size)  # remove a partial line
            raise
        self.waiting.clear()

    def save(self, name: str, state: dict, previous: str = "") -> None:
        """
        Save a checkpoint after the lines of metrics up to it; the file it replaces becomes `previous`. Warns
        and tries again twice, then raises an OSError.
        """
        for wait in (1, 5, 0):
            try:
                self.flush(sync=True)
                keep = self.folder / previous if previous else None
                return checkpoint.save(self.folder / name, state, keep)
            except (OSError, RuntimeError) as error:  # torch.save raises the latter
                again = ", trying again" if wait else ""
                print0(f"WARNING: could not save {name} at step {state['step']}: {error}{again}")
                time.sleep(wait)
        raise OSError(f"{self.folder} cannot be written to; the previous checkpoint is intact")


def replace_text(file: Path, text: str) -> None:
    """Write a file at once or not at all."""
    temporary = file.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, file)


def read_metrics(folder: Path) -> list[dict]:
    """The lines of metrics.jsonl. Warns of others, except for a last one that a kill has torn."""
    file, lines, others = folder / "metrics.jsonl", [], 0
    texts = file.read_bytes().split(b"\n") if file.exists() else []
    for text in texts:
        try:
            line = json.loads(text)
            check(line, METRICS[line["split"]])
            lines.append(line)
        except (ValueError, KeyError, TypeError, RecursionError):
            others += text not in (b"", texts[-1])
    if others:
        print0(f"WARNING: {file}: {others} of {len(texts)} lines are not of a run, and skipped")
    return lines


def read_config(folder: Path) -> dict:
    """config.json of a run; {} if it is damaged, or the run of an earlier version, which has none."""
    try:
        return read_json(folder / "config.json", {"data": {}})
    except (OSError, ValueError):
        return {}


def lines_until(state: dict, lines: list[dict], max_iters: int) -> list[dict]:
    """
    The lines of metrics up to the step of `state`. A run that ended there off its intervals wrote final lines
    at that step; they are removed, because the resumed run repeats or continues past them.
    """
    end, every = state["progress"]["step"], state["train_config"]
    keep = {
        "val": end % every["eval_interval"] == 0,
        "train": end % every["log_interval"] == 0 or end == 1 or end >= max_iters,
    }
    return [x for x in lines if x["step"] < end or x["step"] == end and keep[x["split"]]]


def fingerprint(train: np.ndarray, val: np.ndarray) -> dict[str, list[int]]:
    """Size and checksum of both .bin files, to notice that a run's data changed."""
    return {
        name: [len(ids), zlib.crc32(memoryview(ids).cast("B"))]
        for name, ids in (("train", train), ("val", val))
    }


# ----------------------------------------------------------------------------------------------------------
# Choosing the directory, and the settings of a resumed run


def new_folder(name: str) -> Path:
    """out/NAME, or the first of out/NAME-2, out/NAME-3, ... that does not exist."""
    folders = (Path("out", f"{name}-{n}" if n > 1 else name) for n in itertools.count(1))
    return next(folder for folder in folders if not folder.exists())


def folders_of(name: str) -> list[Path]:
    """Default directories of a recipe's runs, newest first."""
    found = [f for f in Path("out").glob("*") if re.fullmatch(re.escape(name) + r"(-\d+)?", f.name)]
    return sorted(found, key=lambda folder: folder.stat().st_mtime, reverse=True)


def last_state(folder: Path, values: dict) -> dict | None:
    """The newest intact checkpoint of a run; None if it has none yet. Its key `file` is the file's name."""
    files = [folder / name for name in ("latest.pt", "previous.pt") if (folder / name).exists()]
    known = {f"{name}?": TYPES[type(value)] for name, value in values.items()}  # all settings
    config = known | dict.fromkeys(CHANGING, COUNT) | {"patience": WHOLE, "model": {}, "*": NONE}
    config["objective_config?"] = {}
    for file in files:
        try:
            state = {"architecture": "gpt"} | checkpoint.read(file) | {"file": file.name}
            with naming(file):
                check(state, RESUME | {"train_config": config, "recipe": known | {"*": ANY}})
        except ValueError as error:
            if file == files[-1]:
                raise
            print0(f"WARNING: {error}")
            continue
        if "ema" in state:
            raise ValueError(
                f"{folder} averages its weights (ema), which a resumed run no longer does; "
                f"start from its best weights with {shlex.quote(f'--init_from={folder}')}"
            )
        return state
    print0(f"{folder} has no checkpoint yet: starting at step 0")
    return None


def find(values: dict, name: str, flags: set[str], extended: bool) -> tuple[Path, dict | None]:
    """
    The directory of a run with these settings, and the checkpoint to resume from. `extended`: the command
    line gives the run more updates or patience, so --resume without out_dir may also continue a finished run.
    """
    out_dir = values["out_dir"]
    if "resume" in flags:
        for folder in [Path(out_dir)] if out_dir else folders_of(name):
            if (folder / "metrics.jsonl").exists():
                state = last_state(folder, values)
                if out_dir or extended or state is None:
                    return folder, state
                settings = state["train_config"]
                if not Progress(**state["progress"]).finished(settings["max_iters"], settings["patience"]):
                    return folder, state
        what = f"{out_dir} holds no run" if out_dir else f"no unfinished run out/{name}"
        raise ValueError(f"nothing to resume: {what}")
    if not out_dir:
        return new_folder(name), None
    if Path(out_dir, "metrics.jsonl").exists() and "overwrite" not in flags:
        raise ValueError(f"{out_dir} holds a run; --resume continues it, --overwrite discards it")
    return Path(out_dir), None


def resumed_settings(
    state: dict, recipe: dict, recipe_before: dict, given: dict, may_change: tuple[str, ...], override: bool
) -> dict:
    """
    The flat settings of a resumed run: those of its checkpoint, except for what the command line gives
    (`given`) and what was edited in the recipe since (both complete, including defaults). ValueError
    names changes that would make it a different run, unless `override`.
    """
    before = checkpoint.flat_settings(state)
    wanted = before | {k: v for k, v in recipe.items() if v != recipe_before[k]} | given
    changes = {k: f"{k}: {before.get(k)!r} -> {v!r}" for k, v in wanted.items() if v != before.get(k)}
    other = [change for name, change in changes.items() if name not in may_change]
    rows = "batch_size", "gradient_accumulation_steps"
    if math.prod(before[k] for k in rows) != math.prod(wanted[k] for k in rows):
        other.append(" * ".join(rows))
    if other and not override:
        raise ValueError(
            f"these settings cannot change on resume: {'; '.join(other)}; --override changes them anyway"
        )
    for change in changes.values():
        print0(f"changed for the rest of the run: {change}")
    experiments = state["architecture"], before.get("objective", "")
    saved, now = state["provenance"], checkpoint.provenance(*experiments)
    for file in checkpoint.code(*experiments):
        if saved.get(file) != now.get(file):
            print0(f"{file} has changed since the checkpoint: results may differ")
    return wanted
