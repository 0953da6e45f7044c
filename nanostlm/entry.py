"""
How every script begins and ends: signals, output that cannot be written, errors in one line, exit statuses.

The scripts import this module first, so that it holds while PyTorch is imported, and decorate main(argv) with
`script`. Imported by anything else, such as a notebook, it changes nothing.
"""

import atexit
import contextlib
import errno
import functools
import io
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable

ROOT = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
MAIN = os.path.realpath(getattr(sys.modules["__main__"], "__file__", None) or "").removeprefix(ROOT + os.sep)
FILTERS = ("sample.py", "evaluate.py", "nanostlm/toystories.py")  # they end when nobody reads their stdout
SCRIPTS = ("train.py", "prepare.py", "export.py", *FILTERS)
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
USER_ERRORS = (ValueError, FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError)
PATH_ERRNOS = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL)  # too
received: dict[int, float] = {}  # the stop signals since main() began, and when each came first
lost: dict[int, OSError] = {}  # why stdout (1) or stderr (2) could not be written


@contextlib.contextmanager
def on_signals(act: Callable[[int], None], notice: str, save=signal.SIG_IGN):
    """
    Inside, SIGINT and SIGTERM print `notice` and call act(number), and SIGUSR1 calls save(number, frame). A
    second one ends the process at once, but not within a second: torchrun and a key held down repeat signals.
    """

    def stop(number, frame):
        first, now = not received, time.monotonic()
        since = now - received.setdefault(number, now)
        if since > 1:
            os._exit(128 + number)
        if first and os.environ.get("RANK", "0") == "0":
            line = "\n" * os.isatty(2) + f"{signal.Signals(number).name}: {notice}\n"  # a terminal shows ^C
            with contextlib.suppress(OSError):  # not print, which may be what this handler interrupts
                os.write(2, line.encode())
        if since == 0:
            act(number)

    new = {getattr(signal, "SIGUSR1", signal.SIGINT): save} | dict.fromkeys(STOP_SIGNALS, stop)
    before = {number: signal.signal(number, handler) for number, handler in new.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Requests:
    """What signals ask of a training loop, which looks at it after every step."""

    stop = 0  # the number of a signal that ends the run
    save = False  # SIGUSR1

    @property
    def ending(self) -> int:
        """The signal that ends the run, or 0. Output that cannot be written ends it like SIGTERM."""
        return self.stop or (signal.SIGTERM if lost else 0)

    def handle(self):
        """Inside, signals are only noted."""
        stop, save = (functools.partial(setattr, self, name) for name in ("stop", "save"))
        return on_signals(stop, "saving after this step; once more ends at once", lambda *_: save(True))


class Output(io.TextIOWrapper):
    """stdout or stderr. After a failure, what is written is dropped, and `lost` has the reason."""

    def write(self, text: str) -> int:
        return self.attempt(super().write, text)

    def flush(self) -> None:
        self.attempt(super().flush)

    def attempt(self, do: Callable, *args):
        try:
            return do(*args)
        except OSError as error:
            number, name = self.fileno(), {1: "stdout", 2: "stderr"}[self.fileno()]
            lost[number] = type(error)(f"{name} cannot be written: {error.strerror}")
            os.dup2(os.open(os.devnull, os.O_WRONLY), number)  # takes what is still in the buffer
            if number == 1 and MAIN in FILTERS:
                sys.exit()


def report(error: BaseException) -> int:
    """
    Print in one line why a script ends. -> its exit status. What neither this code raises nor the system
    reports gets its type and the last line of this code that it passed, because users edit this code.
    """
    import traceback

    if os.environ.get("NANOSTLM_TRACEBACK"):
        traceback.print_exception(error)
    message, frames = " ".join(str(error).split()), traceback.extract_tb(error.__traceback__)
    here = [f for f in frames if os.path.realpath(f.filename).startswith(ROOT + os.sep)]
    ours = [f for f in here if "site-packages" not in f.filename]  # of a virtual environment inside
    raised = ours and ours[-1] is frames[-1] and "raise " in ours[-1].line
    if ours and not raised and not isinstance(error, OSError):
        file, line = ours[-1].filename, ours[-1].lineno
        if isinstance(error, SyntaxError):
            message, file, line = error.msg, error.filename or file, error.lineno or line
        message = f"{type(error).__name__}: {message} ({os.path.relpath(file, ROOT)}:{line})"
    print(f"error: {message[:1000] or type(error).__name__}", file=sys.stderr)
    return 2 if isinstance(error, USER_ERRORS) or getattr(error, "errno", None) in PATH_ERRNOS else 1


def script(main: Callable[[list[str]], int | None]) -> Callable[..., int]:
    """
    Decorate a script's main(argv), so that it returns the exit status: 0 for success, 1 if the machine or the
    run failed, 2 for a user error, 130 after Ctrl-C, 143 after SIGTERM. A stdout whose reader has left, as
    with `| head`, is no failure; a stdout on a full disk is one.
    """

    @functools.wraps(main)
    def wrapper(argv: list[str] | None = None) -> int:
        received.clear()
        try:
            with on_signals(lambda number: sys.exit(128 + number), "ended, with nothing lost"):
                status = main(sys.argv[1:] if argv is None else argv) or 0
        except (SystemExit, KeyboardInterrupt) as ended:  # --help, or a signal
            status = getattr(ended, "code", 128 + signal.SIGINT) or 0
        except Exception as error:
            status = report(error)
        if not status and not isinstance(lost.get(1), BrokenPipeError | None):
            status = report(lost[1])
        return status

    return wrapper


def unraisable(info) -> None:
    if isinstance(info.exc_value, SystemExit):  # of a signal, in a destructor or a callback
        os._exit(info.exc_value.code or 0)
    sys.__unraisablehook__(info)


if MAIN in SCRIPTS and "IPython" not in sys.modules:  # whose %run is no process of its own
    for number in STOP_SIGNALS:  # until main() begins and once it has ended
        signal.signal(number, lambda number, frame: os._exit(128 + number))
    # at the very end, Python removes its handlers, and a signal would kill a script that is done
    atexit.register(lambda: [signal.signal(number, signal.SIG_IGN) for number in STOP_SIGNALS])
    for number, stream in enumerate((sys.stdin, sys.stdout, sys.stderr)):
        if stream is None:  # closed: else the next file that is opened takes its number
            os.dup2(os.open(os.devnull, os.O_RDWR), number)
            if number == 1:
                lost[1] = BrokenPipeError("stdout is closed")
    sys.stdin = sys.stdin or open(0)
    files = (open(number, "wb", closefd=False) for number in (1, 2))
    sys.stdout, sys.stderr = (Output(file, "utf-8", "replace", line_buffering=True) for file in files)
    sys.excepthook = lambda kind, error, trace: sys.exit(report(error))
    sys.unraisablehook = unraisable
    warnings.formatwarning = lambda message, *_, **__: f"note: {' '.join(str(message).split())}\n"
