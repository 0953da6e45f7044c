"""
nanostlm/entry.py: exit statuses, one-line errors, signals in each phase of a script, unwritable output.

Most tests run scripts of a minimal repository that contains only nanostlm/entry.py: they start in
milliseconds, and each phase lasts as long as the test needs.
"""

import ast
import errno
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import MICRO, ROOT, bit_equal, cli_args, metrics, random_data, run_state, trainer

import prepare
import sample
import train
from nanostlm import entry, generate, report
from nanostlm.data import remedy
from nanostlm.tokenizer import Unreachable

posix = pytest.mark.skipif(os.name == "nt", reason="signals and descriptors of POSIX")
SCRIPTS = ("train", "prepare", "sample", "evaluate", "export")
STATUS = {signal.SIGINT: 130, signal.SIGTERM: 143}
signals = pytest.mark.parametrize("number", STATUS, ids=lambda number: number.name)

# ----------------------------------------------------------------------------------------------------------
# One-line errors


EXPECTED_ERRORS = [
    (ValueError("a\n  b"), 2, "a b"),
    (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"), 2, "invalid start byte"),
    (json.JSONDecodeError("Expecting value", "", 0), 2, "Expecting value"),
    (FileNotFoundError(2, "No such file", "x.txt"), 2, "[Errno 2] No such file: 'x.txt'"),
    (FileExistsError("x exists"), 2, "x exists"),
    (IsADirectoryError("x is a folder"), 2, "x is a folder"),
    (NotADirectoryError("x is a file"), 2, "x is a file"),
    (Unreachable("no network"), 1, "no network"),
    (PermissionError(13, "Permission denied", "x"), 2, "Permission denied"),
    (BrokenPipeError(32, "Broken pipe"), 1, "Broken pipe"),  # of a socket; stdout does not raise it
    (OSError(28, "No space left on device"), 1, "No space left on device"),
    (RuntimeError("the kernel failed"), 1, "the kernel failed"),
    (torch.OutOfMemoryError("CUDA out of memory"), 1, "CUDA out of memory"),
    (MemoryError(), 1, "MemoryError"),
    (ImportError("No module named 'x'"), 1, "No module named 'x'"),
    (KeyError("x"), 1, "'x'"),
]


def exit_status(call) -> int:
    return entry.script(lambda argv: call())([])


@pytest.mark.parametrize("error, status, message", EXPECTED_ERRORS, ids=lambda x: type(x).__name__)
def test_expected_error_prints_its_message_and_sets_the_status(error, status, message, capsys):
    def fail():
        raise error

    assert exit_status(fail) == status
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and message in err and err.count("\n") == 1
    assert "test_entry" not in err


def recurse():
    return recurse()


BUGS = {
    "KeyError: 'x'": lambda: {}["x"],
    "IndexError: list index out of range": lambda: [][0],
    "ZeroDivisionError: division by zero": lambda: 1 / 0,
    "TypeError: ": lambda: 1 + "",
    "AttributeError: ": lambda: None.x,
    "NameError: name 'missing' is not defined": lambda: missing,  # noqa: F821
    "StopIteration: ": lambda: next(iter(())),
    "RecursionError: ": recurse,
    "ModuleNotFoundError: No module named 'nowhere'": lambda: __import__("nowhere"),
    "RuntimeError: mat1 and mat2 shapes cannot be multiplied": lambda: torch.ones(2, 3) @ torch.ones(2, 3),
    "SyntaxError: invalid syntax": lambda: compile("def f(:", os.path.join(ROOT, "model.py"), "exec"),
}
BUGS_WITH_STATUS_2 = {
    "ValueError: invalid literal": lambda: int("x"),
    "ValueError: embedded null byte": lambda: open("a\0b"),
    "JSONDecodeError: Expecting value": lambda: json.loads(""),  # raised inside another library
    "UnicodeDecodeError: ": lambda: b"\xff".decode(),
}


@pytest.mark.parametrize("message", BUGS | BUGS_WITH_STATUS_2)
def test_unexpected_error_prints_its_type_and_location(message, capsys):
    """The location is the last line of our code in the traceback."""
    call = (BUGS | BUGS_WITH_STATUS_2)[message]
    assert exit_status(call) == (1 if message in BUGS else 2)
    line = recurse.__code__.co_firstlineno + 1 if call is recurse else call.__code__.co_firstlineno
    location = "model.py:1" if "SyntaxError" in message else f"tests/test_entry.py:{line}"
    err = capsys.readouterr().err
    assert err.startswith(f"error: {message}") and err.endswith(f" ({location})\n") and err.count("\n") == 1


def test_script_reads_sys_argv_and_returns_the_status(capsys, monkeypatch):
    @entry.script
    def main(argv):
        """A description."""
        if argv[0] == "exit":
            sys.exit(3)
        if argv[0] == "ctrl-c":
            raise KeyboardInterrupt
        return {"none": None, "zero": 0, "signal": 143}[argv[0]]

    statuses = [main([arg]) for arg in ("none", "zero", "signal", "ctrl-c", "exit")]
    assert statuses == [0, 0, 143, 130, 3]
    monkeypatch.setattr(sys, "argv", ["some.py", "signal"])
    assert main() == 143 and main.__name__ == "main" and main.__doc__ == "A description."
    assert capsys.readouterr() == ("", "")


# ----------------------------------------------------------------------------------------------------------
# A minimal repository

SCRIPT = r"""
from nanostlm.entry import lost, script

import atexit
import os
import sys
import time
import warnings

import model


class Slow:
    def __del__(self):
        model.ready(2)


@script
def main(argv):
    match argv:
        case ["work"]:
            model.ready(9)
        case ["clean up"]:
            try:
                model.ready(9)
            finally:
                time.sleep(2)
        case ["destroy"]:
            thing = Slow()
            del thing
            time.sleep(9)
        case ["exit"]:
            atexit.register(model.ready, 2)
        case ["print", count]:
            for i in range(int(count)):
                print(i)
            open("done", "w").close()
        case ["both"]:
            print("out")
            print("err", file=sys.stderr)
            print("lost", *sorted(lost), file=open("done", "w"))
        case ["read"]:
            print(repr(sys.stdin.read()))
        case ["open"]:
            print(open("x", "w").fileno() > 2, file=open("done", "w"))
        case ["warn"]:
            warnings.warn("two\n  lines")
        case ["unicode"]:
            print("\u2602 \ud83d")
        case ["bug"]:
            model.bug()
    return 0


if __name__ == "__main__":
    sys.exit(main())
"""
MODEL = r"""
import os
import sys
import time


def ready(seconds):
    os.close(os.open("ready", os.O_CREAT))
    end = time.monotonic() + seconds
    while time.monotonic() < end:  # short sleeps: a signal just before a long one would wait for its end
        time.sleep(0.01)


def bug():
    return {}["x"]


if sys.argv[1:] == ["import"]:
    ready(2)
"""


@pytest.fixture
def repository(tmp_path) -> Path:
    """A folder with all scripts, replaced by SCRIPT, a `model.py` and nanostlm/entry.py."""
    (tmp_path / "nanostlm").mkdir()
    for name in ("__init__.py", "entry.py"):
        shutil.copy(ROOT / "nanostlm" / name, tmp_path / "nanostlm")
    for name in (*SCRIPTS, "other"):
        (tmp_path / f"{name}.py").write_text(SCRIPT)
    (tmp_path / "model.py").write_text(MODEL)
    return tmp_path


def start(folder: Path, *argv: str, script: str = "train", **options) -> subprocess.Popen:
    env = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONWARNINGS": "default"} | options.pop("env", {})
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE) | options
    return subprocess.Popen([sys.executable, f"{script}.py", *argv], cwd=folder, env=env, **pipes)


def wait_until_ready(folder: Path, process: subprocess.Popen) -> None:
    end = time.monotonic() + 20
    while not (folder / "ready").exists() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.002)
    assert (folder / "ready").exists()


def test_script_in_a_subprocess(repository):
    for argv, status, out, err in [
        (["warn"], 0, b"", b"note: two lines\n"),
        (["print", "2"], 0, b"0\n1\n", b""),
        (["unicode"], 0, "\u2602 ?\n".encode(), b""),
        (["bug"], 1, b"", b"error: KeyError: 'x' (model.py:15)\n"),
    ]:
        process = start(repository, *argv)
        texts = process.communicate()
        assert (process.returncode, *(text.replace(b"\r", b"") for text in texts)) == (status, out, err), argv


@pytest.mark.parametrize(
    "text, message",
    {
        "x = (": "SyntaxError: '(' was never closed (model.py:1)",
        "if True:\nx = 1": "IndentationError: expected an indented block after 'if' statement on line 1",
        "y + 1": "NameError: name 'y' is not defined (model.py:1)",
        "\nimport nowhere": "ModuleNotFoundError: No module named 'nowhere' (model.py:2)",
        "from nanostlm.entry import nothing": "ImportError: cannot import name 'nothing'",
        "import json\n\njson.loads('')": "JSONDecodeError: Expecting value: line 1",
        "def f():\n    assert False, 'why'\n\n\nf()": "AssertionError: why (model.py:2)",
    }.items(),
)
def test_error_in_a_module_prints_its_location(text, message, repository):
    (repository / "model.py").write_text(text)
    process = start(repository)
    err = process.communicate()[1].decode()
    assert (
        err.startswith(f"error: {message}") and err.count("\n") == 1 and re.search(r"\(model.py:\d\)$", err)
    )
    assert process.returncode == (2 if "json.loads" in text else 1)


def test_traceback_environment_variable(repository):
    for script, text in (("bug", MODEL), ("import", "y + 1")):
        (repository / "model.py").write_text(text)
        process = start(repository, script, env={"NANOSTLM_TRACEBACK": "1"})
        err = process.communicate()[1].decode()
        assert process.returncode == 1 and err.startswith("Traceback (most recent call last):")
        assert err.splitlines()[-1].startswith("error: ") and 'model.py", line' in err


@pytest.mark.parametrize("name", [f"{name}.py" for name in SCRIPTS])
def test_scripts_import_entry_first(name):
    statements = ast.parse((ROOT / name).read_text(encoding="utf-8")).body
    imports = [s for s in statements if isinstance(s, ast.Import | ast.ImportFrom)]
    assert imports[0].module == "nanostlm.entry" and imports[0] is statements[1]  # after the docstring
    assert name in entry.SCRIPTS


NO_SIDE_EFFECTS = """
import signal, sys, warnings
def state():
    numbers = (signal.SIGINT, signal.SIGTERM)
    streams = (sys.stdin, sys.stdout, sys.stderr)
    hooks = (sys.excepthook, sys.unraisablehook, warnings.formatwarning)
    return (*map(signal.getsignal, numbers), *streams, *hooks)
before = state()
import train, entry_again
train.main(["print", "1"])
assert state() == before
"""


@pytest.mark.parametrize("how", ["-c", "a file"])
def test_import_from_other_programs_has_no_side_effects(how, repository):
    (repository / "entry_again.py").write_text("import importlib\nimportlib.import_module('nanostlm.entry')")
    (repository / "mine.py").write_text(NO_SIDE_EFFECTS)
    argv = ["-c", NO_SIDE_EFFECTS] if how == "-c" else ["mine.py"]
    done = subprocess.run([sys.executable, *argv], cwd=repository, capture_output=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"0\n" if os.name != "nt" else b"0\r\n", b"")


# ----------------------------------------------------------------------------------------------------------
# Signals


@posix
@signals
@pytest.mark.parametrize("times", [1, 3], ids=["once", "held down"])
@pytest.mark.parametrize("phase", ["import", "work", "clean up", "destroy", "exit"])
def test_signal_in_each_phase(phase, times, number, repository):
    process = start(repository, phase)
    wait_until_ready(repository, process)
    start_time = time.monotonic()
    for _ in range(times):
        process.send_signal(number)
        time.sleep(0.02)
    out, err = process.communicate(timeout=20)
    assert process.returncode == STATUS[number] and out == b""
    silent = phase in ("import", "exit")
    assert err.decode() == ("" if silent else f"{number.name}: ended, with nothing lost\n")
    assert (time.monotonic() - start_time > 1.9) == (phase == "clean up"), "finally blocks are executed"


@posix
@signals
def test_second_signal_after_a_second_exits_immediately(number, repository):
    process = start(repository, "clean up")
    wait_until_ready(repository, process)
    process.send_signal(number)
    time.sleep(1.1)
    process.send_signal(number)
    start_time = time.monotonic()
    assert process.communicate(timeout=20)[1].count(b"\n") == 1 and process.returncode == STATUS[number]
    assert time.monotonic() - start_time < 0.5


@posix
@pytest.mark.parametrize("script", SCRIPTS)
def test_sigint_at_different_times(script, repository):
    """After the first line of the script; before it, Python itself is still starting."""
    for i in range(6):
        process = start(repository, "import" if i % 2 else "work", script=script)
        wait_until_ready(repository, process)
        (repository / "ready").unlink()
        time.sleep(0.01 * i)
        process.send_signal(signal.SIGINT)
        err = process.communicate(timeout=20)[1]
        assert process.returncode == 130 and err.count(b"\n") <= 1


@posix
def test_signal_with_closed_stderr(repository):
    process = start(repository, "work")
    wait_until_ready(repository, process)
    process.stderr.close()
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 130


@posix
@pytest.mark.parametrize("rank, lines", [("0", 1), ("1", 0)])
def test_only_rank_0_prints(rank, lines, repository):
    process = start(repository, "work", env={"RANK": rank})
    wait_until_ready(repository, process)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=20)[1].count(b"\n") == lines and process.returncode == 130


@posix
def test_requests_are_recorded_and_handlers_restored():
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    before, requests = [signal.getsignal(number) for number in numbers], entry.Requests()
    entry.received.clear()
    with pytest.raises(ZeroDivisionError), requests.handle():
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM):
            os.kill(os.getpid(), number)
        assert requests.save and requests.stop == signal.SIGTERM
        os.kill(os.getpid(), signal.SIGINT)
        assert requests.stop == signal.SIGINT, "the most recent one"
        assert [signal.getsignal(number) for number in numbers] != before
        raise ZeroDivisionError
    entry.received.clear()
    assert [signal.getsignal(number) for number in numbers] == before


# ----------------------------------------------------------------------------------------------------------
# Unwritable output, closed streams

STREAMS = {  # redirections in a shell -> exit status of train, prepare and export, and of sample and evaluate
    ">&-": (0, 0),
    "2>&-": (0, 0),
    "<&-": (0, 0),
    "<&- >&- 2>&-": (0, 0),
    "> /dev/full": (1, 1),
    "2> /dev/full": (0, 0),
    "> /dev/full 2>&1": (1, 1),
    "> /dev/full 2>&-": (1, 1),
    "| head -1": (0, 0),
    "2>&1 | head -1": (0, 0),
    "| exec <&-": (0, 0),
}
FULL = b"error: stdout cannot be written: No space left on device\n"


def shell(folder: Path, script: str, argv: list[str], streams: str) -> tuple[int, bytes]:
    """Run `script argv streams` in a shell -> (the status of the script, stderr of the shell)."""
    line = shlex.join([sys.executable, f"{script}.py", *argv])
    line = (
        f"{{ {line}; echo $? > status; }} {streams}"
        if "|" in streams
        else f"{line} {streams}; echo $? > status"
    )
    done = subprocess.run(["bash", "-c", line], cwd=folder, capture_output=True)
    return int((folder / "status").read_text()), done.stderr


@posix
@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("count", ["1", "100000"])
@pytest.mark.parametrize("streams", STREAMS)
def test_unwritable_output(streams, count, script, repository):
    if not os.path.exists("/dev/full") and "full" in streams:
        pytest.skip("needs /dev/full")
    status, err = shell(repository, script, ["print", count], streams)
    assert status == STREAMS[streams][script in ("sample", "evaluate")]
    assert err == (FULL if streams == "> /dev/full" else b"")
    if script in ("train", "prepare", "export"):
        assert (repository / "done").exists(), "the script ran to its end"


@posix
@pytest.mark.parametrize("streams", ["<&-", ">&-", "2>&-", "<&- >&-", "<&- 2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_opened_file_does_not_reuse_a_closed_stream(streams, repository):
    """Otherwise, a library's warning on stderr would be written to that file."""
    assert shell(repository, "train", ["open"], streams)[0] == 0
    assert (repository / "done").read_text() == "True\n"


@posix
def test_lost_lists_the_unwritable_streams(repository):
    for streams, numbers in {"": "", ">&-": " 1", "2> /dev/full": " 2", "> /dev/full 2>&1": " 1 2"}.items():
        shell(repository, "train", ["both"], streams)
        assert (repository / "done").read_text() == f"lost{numbers}\n"


@posix
def test_closed_stdin_reads_as_empty(repository):
    process = subprocess.run(
        ["bash", "-c", f"{sys.executable} sample.py read <&-"], cwd=repository, capture_output=True
    )
    assert (process.returncode, process.stdout, process.stderr) == (0, b"''\n", b"")


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("code", [errno.EPIPE, errno.ENOSPC, errno.EIO])
def test_training_saves_when_output_fails(code, number, main, monkeypatch):
    """It saves at the current step, and the resumed run is bitwise equal to an uninterrupted one."""
    show = report.Console.show

    def fail_at_step_7(console, line):
        show(console, line)
        if line["step"] == 7:
            monkeypatch.setitem(entry.lost, number, OSError(code, os.strerror(code)))

    assert main("straight", log_interval=1) == 0
    with monkeypatch.context() as patch:
        patch.setattr(report.Console, "show", fail_at_step_7)
        assert main("run", log_interval=1) == 1
    entry.lost.clear()
    assert f"error: [Errno {code}]" in main.stderr and "the run is saved at step 8" in main.stderr
    assert run_state("run")["step"] == 8
    assert main("run", "--resume", log_interval=1) == 0
    assert metrics("run") == metrics("straight") and bit_equal(run_state("run"), run_state("straight"))


LONG = dict(
    max_iters=100_000, eval_interval=50_000, save_interval=50_000, schedule="constant", log_interval=1
)


@posix
def test_training_saves_when_its_pipe_closes(tmp_path, corpus, main):
    """As a user runs it: `python train.py ... 2>&1 | head -9`."""
    line = shlex.join([sys.executable, str(ROOT / "train.py"), *cli_args(corpus, out_dir="run", **LONG)])
    done = subprocess.run(
        ["bash", "-c", f"{{ {line}; echo $? > status; }} 2>&1 | head -9"], capture_output=True
    )
    assert Path("status").read_text() == "1\n" and done.stderr == b""
    step = run_state("run")["step"]
    assert step == metrics("run")[-1]["step"] >= 1
    assert main("run", "--resume", micro=False, max_iters=step + 3) == 0
    assert main("straight", **LONG | dict(max_iters=step + 3)) == 0
    assert metrics("run") == metrics("straight") and bit_equal(run_state("run"), run_state("straight"))


@posix
@signals
def test_signal_in_the_final_report(number, main, monkeypatch):
    def final(trainer, name):
        os.kill(os.getpid(), number)
        raise AssertionError("it continued after the signal")

    monkeypatch.setattr(report, "final", final)
    assert main("run") == STATUS[number] and run_state("run")["step"] == MICRO["max_iters"]


@posix
@signals
def test_signal_in_the_last_evaluation(number, main, monkeypatch):
    """The run is finished: no report follows, and no hint to resume it."""
    real = train.Trainer.val_step

    def val_step(trainer):
        if trainer.progress.step == MICRO["max_iters"]:
            os.kill(os.getpid(), number)
        return real(trainer)

    monkeypatch.setattr(train.Trainer, "val_step", val_step)
    assert main("run") == STATUS[number] and "the run is finished" in main.stderr
    assert run_state("run")["step"] == MICRO["max_iters"]


# ----------------------------------------------------------------------------------------------------------
# Printed commands

SPECIAL_NAMES = [
    "plain",
    "two words",
    "$HOME",
    "it's",
    'a"b',
    "a;b",
    "a&b",
    "*",
    "~",
    "#x",
    "a\\b",
    "résumé",
    "-x",
    "(a)",
]


@pytest.mark.parametrize("name", SPECIAL_NAMES)
def test_printed_commands_are_quoted_for_the_shell(name, main, tmp_path, capsys):
    assert main(f"./{name}", stop_after=2) == 143
    command = shlex.split(main.stderr.rpartition("continue with: ")[2])
    assert command[:2] == ["python", "train.py"] and f"--out_dir=./{name}" in command
    assert command[-1] == "--resume"
    command = shlex.split(remedy(tmp_path / name / "mini" / "byte").partition(": ")[2])
    assert command[command.index("--data_dir") + 1] == str(tmp_path / name)
    with pytest.raises(ValueError, match="not a valid corpus name") as excinfo:
        prepare.prepare(f"{name}.txt", data_dir=tmp_path)
    assert shlex.split(str(excinfo.value).partition("corpus name: ")[2])[-1] == f"{name}.txt"


@pytest.mark.parametrize("name", ["resume", "overwrite", "override"])
def test_resume_command_keeps_a_value_named_like_a_flag(name, main):
    assert main("", "--out_dir", name, "--overwrite", stop_after=2) == 143
    argv = shlex.split(main.stderr.rpartition("continue with: ")[2])
    assert argv[argv.index("--out_dir") + 1] == name and "--overwrite" not in argv


@pytest.mark.parametrize("prompt", ["Tom", "it's $HOME; ls", "-x", "--zzz", "two\nlines", '"', "", "#"])
def test_next_command_is_valid_for_sample(prompt, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(report, "plot", lambda *args: None)
    monkeypatch.setattr(generate, "stories", lambda *args, **sampling: [])
    data = random_data()._replace(meta={"corpus": "numbers", "val": dict(bytes=80, stories=10, tokens=90)})
    folder = tmp_path / f"of {prompt}"
    report.final(trainer(data, out_dir=folder, prompt=prompt), "run")
    command = shlex.split(capsys.readouterr().err.rpartition("next:  ")[2])
    options = sample.parse(command[2:])
    assert command[:2] == ["python", "sample.py"]
    assert (options.out_dir, options.prompt) == (str(folder), prompt)
