"""
Programs in processes of their own, forked from one that has torch in memory already: a start costs
milliseconds rather than seconds. `Program` is what tests start, signal and kill.
"""

import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["torch", "train", "sample", "launch"])


def child(argv: list[str], folder: str, env: dict[str, str], hook, output: str) -> None:
    """In the new process: `train.py argv` in `folder`, its output in a file, hook() called first."""
    try:
        os.chdir(folder)
        os.environ.update(env)
        handle = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        import torch

        import train

        torch.set_num_threads(1)
        train.report = lambda trainer, name: None  # the curve and the stories have tests of their own
        if hook:
            hook[0](*hook[1:])
        status = train.main(argv)
    except KeyboardInterrupt:
        status = 130
    sys.exit(status)


class Program:
    """train.main(argv) on its way. `hook`: a function and its arguments, called in the process first."""

    count = 0

    def __init__(self, argv: list[str], folder: Path, env: dict[str, str] | None = None, hook: tuple = ()):
        Program.count += 1
        os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])  # of the fork server
        self.output = Path(folder, f".output-{Program.count}")
        args = [str(word) for word in argv], str(folder), env or {}, hook, str(self.output)
        self.process = FORKS.Process(target=child, args=args, daemon=True)  # ends with us
        self.process.start()

    @property
    def text(self) -> str:
        return self.output.read_text(encoding="utf-8", errors="replace") if self.output.exists() else ""

    def wait(self, seconds: float = 60) -> int:
        """Its exit status; that of a signal is negative. Killed where it takes too long."""
        self.process.join(seconds)
        if self.process.exitcode is None:
            self.kill()
            raise TimeoutError(f"still running after {seconds} s:\n{self.text}")
        return self.process.exitcode

    def until(self, words: str, seconds: float = 60) -> None:
        """Wait until it has said `words`."""
        end = time.monotonic() + seconds
        while words not in self.text:
            if self.process.exitcode is not None or time.monotonic() > end:
                raise TimeoutError(f"{words!r} was never said, status {self.process.exitcode}:\n{self.text}")
            time.sleep(0.002)

    def signal(self, number: int) -> None:
        os.kill(self.process.pid, number)

    def kill(self) -> None:
        if self.process.is_alive():
            self.signal(signal.SIGKILL)
        self.process.join()
