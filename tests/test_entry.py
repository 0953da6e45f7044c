"""
How scripts begin and end: statuses, errors in one line, signals in every phase, output that cannot be
written.

Most processes here are scripts of a copy of the repository that has only nanostlm/entry.py: they start in
milliseconds, and each of their phases lasts as long as a test needs.
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
# Errors in one line


FORESEEN = [
    (ValueError("a\n  b"), 2, "a b"),
    (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"), 2, "invalid start byte"),
    (json.JSONDecodeError("Expecting value", "", 0), 2, "Expecting value"),
    (FileNotFoundError(2, "No such file", "x.txt"), 2, "[Errno 2] No such file: 'x.txt'"),
    (FileExistsError("x is there"), 2, "x is there"),
    (IsADirectoryError("x is a folder"), 2, "x is a folder"),
    (NotADirectoryError("x is a file"), 2, "x is a file"),
    (Unreachable("no network"), 1, "no network"),
    (PermissionError(13, "Permission denied", "x"), 2, "Permission denied"),
    (BrokenPipeError(32, "Broken pipe"), 1, "Broken pipe"),  # of a connection: stdout raises none
    (OSError(28, "No space left on device"), 1, "No space left on device"),
    (RuntimeError("the kernel failed"), 1, "the kernel failed"),
    (torch.OutOfMemoryError("CUDA out of memory"), 1, "CUDA out of memory"),
    (MemoryError(), 1, "MemoryError"),
    (ImportError("No module named 'x'"), 1, "No module named 'x'"),
    (KeyError("x"), 1, "'x'"),
]


def status_of(do) -> int:
    return entry.script(lambda argv: do())([])


@pytest.mark.parametrize("error, status, said", FORESEEN, ids=lambda x: type(x).__name__)
def test_what_this_code_raises_is_its_message(error, status, said, capsys):
    def do():
        raise error

    assert status_of(do) == status
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and said in err and err.count("\n") == 1
    assert "test_entry" not in err


def endless():
    return endless()


UNFORESEEN = {
    "KeyError: 'x'": lambda: {}["x"],
    "IndexError: list index out of range": lambda: [][0],
    "ZeroDivisionError: division by zero": lambda: 1 / 0,
    "TypeError: ": lambda: 1 + "",
    "AttributeError: ": lambda: None.x,
    "NameError: name 'missing' is not defined": lambda: missing,  # noqa: F821
    "StopIteration: ": lambda: next(iter(())),
    "RecursionError: ": endless,
    "ModuleNotFoundError: No module named 'nowhere'": lambda: __import__("nowhere"),
    "RuntimeError: mat1 and mat2 shapes cannot be multiplied": lambda: torch.ones(2, 3) @ torch.ones(2, 3),
    "SyntaxError: invalid syntax": lambda: compile("def f(:", os.path.join(ROOT, "model.py"), "exec"),
}
UNFORESEEN_VALUES = {
    "ValueError: invalid literal": lambda: int("x"),
    "ValueError: embedded null byte": lambda: open("a\0b"),
    "JSONDecodeError: Expecting value": lambda: json.loads(""),  # deep inside another library
    "UnicodeDecodeError: ": lambda: b"\xff".decode(),
}


@pytest.mark.parametrize("said", UNFORESEEN | UNFORESEEN_VALUES)
def test_any_other_error_is_named_with_the_last_line_of_our_code(said, capsys):
    do = (UNFORESEEN | UNFORESEEN_VALUES)[said]
    assert status_of(do) == (1 if said in UNFORESEEN else 2)
    line = endless.__code__.co_firstlineno + 1 if do is endless else do.__code__.co_firstlineno
    where = "model.py:1" if "SyntaxError" in said else f"tests/test_entry.py:{line}"
    err = capsys.readouterr().err
    assert err.startswith(f"error: {said}") and err.endswith(f" ({where})\n") and err.count("\n") == 1


def test_a_script_takes_the_command_line_and_returns_the_status(capsys, monkeypatch):
    @entry.script
    def main(argv):
        """What it does."""
        if argv[0] == "exit":
            sys.exit(3)
        if argv[0] == "ctrl-c":
            raise KeyboardInterrupt
        return {"none": None, "zero": 0, "signal": 143}[argv[0]]

    found = [main([word]) for word in ("none", "zero", "signal", "ctrl-c", "exit")]
    assert found == [0, 0, 143, 130, 3]
    monkeypatch.setattr(sys, "argv", ["some.py", "signal"])
    assert main() == 143 and main.__name__ == "main" and main.__doc__ == "What it does."
    assert capsys.readouterr() == ("", "")


# ----------------------------------------------------------------------------------------------------------
# A repository of scripts that do nothing

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
            open("whole", "w").close()
        case ["both"]:
            print("out")
            print("err", file=sys.stderr)
            print("lost", *sorted(lost), file=open("whole", "w"))
        case ["read"]:
            print(repr(sys.stdin.read()))
        case ["open"]:
            print(open("x", "w").fileno() > 2, file=open("whole", "w"))
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
    while time.monotonic() < end:  # a signal just before a long sleep would wait for its end
        time.sleep(0.01)


def bug():
    return {}["x"]


if sys.argv[1:] == ["import"]:
    ready(2)
"""


@pytest.fixture
def repository(tmp_path) -> Path:
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


def until_ready(folder: Path, process: subprocess.Popen) -> None:
    end = time.monotonic() + 20
    while not (folder / "ready").exists() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.002)
    assert (folder / "ready").exists()


def test_a_script_in_a_process_of_its_own(repository):
    for argv, status, out, err in [
        (["warn"], 0, b"", b"note: two lines\n"),
        (["print", "2"], 0, b"0\n1\n", b""),
        (["unicode"], 0, "\u2602 ?\n".encode(), b""),
        (["bug"], 1, b"", b"error: KeyError: 'x' (model.py:15)\n"),
    ]:
        process = start(repository, *argv)
        found = process.communicate()
        assert (process.returncode, *(text.replace(b"\r", b"") for text in found)) == (status, out, err), argv


@pytest.mark.parametrize(
    "text, said",
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
def test_an_error_in_an_edited_file(text, said, repository):
    (repository / "model.py").write_text(text)
    process = start(repository)
    err = process.communicate()[1].decode()
    assert err.startswith(f"error: {said}") and err.count("\n") == 1 and re.search(r"\(model.py:\d\)$", err)
    assert process.returncode == (2 if "json.loads" in text else 1)


def test_the_whole_traceback(repository):
    for script, text in (("bug", MODEL), ("import", "y + 1")):
        (repository / "model.py").write_text(text)
        process = start(repository, script, env={"NANOSTLM_TRACEBACK": "1"})
        err = process.communicate()[1].decode()
        assert process.returncode == 1 and err.startswith("Traceback (most recent call last):")
        assert err.splitlines()[-1].startswith("error: ") and 'model.py", line' in err


@pytest.mark.parametrize("name", [f"{name}.py" for name in SCRIPTS])
def test_every_script_imports_the_entry_first(name):
    statements = ast.parse((ROOT / name).read_text(encoding="utf-8")).body
    found = [s for s in statements if isinstance(s, ast.Import | ast.ImportFrom)]
    assert found[0].module == "nanostlm.entry" and found[0] is statements[1]  # after the docstring
    assert name in entry.SCRIPTS


CHANGES_NOTHING = """
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
def test_importing_it_changes_nothing(how, repository):
    (repository / "entry_again.py").write_text("import importlib\nimportlib.import_module('nanostlm.entry')")
    (repository / "mine.py").write_text(CHANGES_NOTHING)
    argv = ["-c", CHANGES_NOTHING] if how == "-c" else ["mine.py"]
    done = subprocess.run([sys.executable, *argv], cwd=repository, capture_output=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"0\n" if os.name != "nt" else b"0\r\n", b"")


# ----------------------------------------------------------------------------------------------------------
# Signals


@posix
@signals
@pytest.mark.parametrize("times", [1, 3], ids=["once", "held down"])
@pytest.mark.parametrize("phase", ["import", "work", "clean up", "destroy", "exit"])
def test_a_signal_in_every_phase(phase, times, number, repository):
    process = start(repository, phase)
    until_ready(repository, process)
    began = time.monotonic()
    for _ in range(times):
        process.send_signal(number)
        time.sleep(0.02)
    out, err = process.communicate(timeout=20)
    assert process.returncode == STATUS[number] and out == b""
    quiet = phase in ("import", "exit")
    assert err.decode() == ("" if quiet else f"{number.name}: ended, with nothing lost\n")
    assert (time.monotonic() - began > 1.9) == (phase == "clean up"), "it is allowed to clean up"


@posix
@signals
def test_a_second_signal_a_second_later(number, repository):
    process = start(repository, "clean up")
    until_ready(repository, process)
    process.send_signal(number)
    time.sleep(1.1)
    process.send_signal(number)
    began = time.monotonic()
    assert process.communicate(timeout=20)[1].count(b"\n") == 1 and process.returncode == STATUS[number]
    assert time.monotonic() - began < 0.5


@posix
@pytest.mark.parametrize("script", SCRIPTS)
def test_signals_at_random_moments(script, repository):
    """From the first line of the script on: before it, Python is still starting."""
    for i in range(6):
        process = start(repository, "import" if i % 2 else "work", script=script)
        until_ready(repository, process)
        (repository / "ready").unlink()
        time.sleep(0.01 * i)
        process.send_signal(signal.SIGINT)
        err = process.communicate(timeout=20)[1]
        assert process.returncode == 130 and err.count(b"\n") <= 1


@posix
def test_a_signal_while_the_output_is_lost(repository):
    process = start(repository, "work")
    until_ready(repository, process)
    process.stderr.close()
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 130


@posix
@pytest.mark.parametrize("rank, said", [("0", 1), ("1", 0)])
def test_one_process_of_several_speaks(rank, said, repository):
    process = start(repository, "work", env={"RANK": rank})
    until_ready(repository, process)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=20)[1].count(b"\n") == said and process.returncode == 130


@posix
def test_requests_and_handlers_as_before():
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    before, requests = [signal.getsignal(number) for number in numbers], entry.Requests()
    entry.received.clear()
    with pytest.raises(ZeroDivisionError), requests.handle():
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM):
            os.kill(os.getpid(), number)
        assert requests.save and requests.stop == signal.SIGTERM
        os.kill(os.getpid(), signal.SIGINT)
        assert requests.stop == signal.SIGINT, "the last one that came"
        assert [signal.getsignal(number) for number in numbers] != before
        raise ZeroDivisionError
    entry.received.clear()
    assert [signal.getsignal(number) for number in numbers] == before


# ----------------------------------------------------------------------------------------------------------
# Output that cannot be written, streams that are closed

STREAMS = {  # what a shell does with the streams -> status of a worker that prints, and of a filter
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
    """The status of `script argv streams` in a shell, and what came on the shell's stderr."""
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
def test_output_that_cannot_be_written(streams, count, script, repository):
    if not os.path.exists("/dev/full") and "full" in streams:
        pytest.skip("needs /dev/full")
    status, err = shell(repository, script, ["print", count], streams)
    assert status == STREAMS[streams][script in ("sample", "evaluate")]
    assert err == (FULL if streams == "> /dev/full" else b"")
    if script in ("train", "prepare", "export"):
        assert (repository / "whole").exists(), "it finishes its work"


@posix
@pytest.mark.parametrize("streams", ["<&-", ">&-", "2>&-", "<&- >&-", "<&- 2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_no_file_becomes_a_closed_stream(streams, repository):
    """A library's warning on stderr would be written into it."""
    assert shell(repository, "train", ["open"], streams)[0] == 0
    assert (repository / "whole").read_text() == "True\n"


@posix
def test_a_script_knows_which_output_was_lost(repository):
    for streams, said in {"": "", ">&-": " 1", "2> /dev/full": " 2", "> /dev/full 2>&1": " 1 2"}.items():
        shell(repository, "train", ["both"], streams)
        assert (repository / "whole").read_text() == f"lost{said}\n"


@posix
def test_a_closed_stdin_is_empty(repository):
    process = subprocess.run(
        ["bash", "-c", f"{sys.executable} sample.py read <&-"], cwd=repository, capture_output=True
    )
    assert (process.returncode, process.stdout, process.stderr) == (0, b"''\n", b"")


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("code", [errno.EPIPE, errno.ENOSPC, errno.EIO])
def test_training_saves_when_its_output_is_lost(code, number, main, monkeypatch):
    """At the current step, not at the last checkpoint, and what follows is what would have been."""
    show = report.Console.show

    def losing(console, line):
        show(console, line)
        if line["step"] == 7:
            monkeypatch.setitem(entry.lost, number, OSError(code, os.strerror(code)))

    assert main("straight", log_interval=1) == 0
    with monkeypatch.context() as patch:
        patch.setattr(report.Console, "show", losing)
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
def test_a_run_whose_reader_leaves(tmp_path, corpus, main):
    """The real thing: `python train.py ... 2>&1 | head -9`."""
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
def test_a_signal_in_the_final_report(number, main, monkeypatch):
    def final(trainer, name):
        os.kill(os.getpid(), number)
        raise AssertionError("it went on")

    monkeypatch.setattr(report, "final", final)
    assert main("run") == STATUS[number] and run_state("run")["step"] == MICRO["max_iters"]


@posix
@signals
def test_a_signal_in_the_last_evaluation(number, main, monkeypatch):
    """The run is finished: there is no report, and nothing to continue."""
    real = train.Trainer.val_step

    def val_step(trainer):
        if trainer.progress.step == MICRO["max_iters"]:
            os.kill(os.getpid(), number)
        return real(trainer)

    monkeypatch.setattr(train.Trainer, "val_step", val_step)
    assert main("run") == STATUS[number] and "the run is finished" in main.stderr
    assert run_state("run")["step"] == MICRO["max_iters"]


# ----------------------------------------------------------------------------------------------------------
# Commands to type

NAMES = [
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


@pytest.mark.parametrize("name", NAMES)
def test_a_printed_command_is_read_back_by_a_shell(name, main, tmp_path, capsys):
    assert main(f"./{name}", stop_after=2) == 143
    command = shlex.split(main.stderr.rpartition("continue with: ")[2])
    assert command[:2] == ["python", "train.py"] and f"--out_dir=./{name}" in command
    assert command[-1] == "--resume"
    command = shlex.split(remedy(tmp_path / name / "mini" / "byte").partition(": ")[2])
    assert command[command.index("--data_dir") + 1] == str(tmp_path / name)
    with pytest.raises(ValueError, match="no name for a corpus") as caught:
        prepare.prepare(f"{name}.txt", data_dir=tmp_path)
    assert shlex.split(str(caught.value).partition("corpus: ")[2])[-1] == f"{name}.txt"


@pytest.mark.parametrize("name", ["resume", "overwrite", "override"])
def test_a_value_that_reads_like_a_flag_is_kept(name, main):
    assert main("", "--out_dir", name, "--overwrite", stop_after=2) == 143
    words = shlex.split(main.stderr.rpartition("continue with: ")[2])
    assert words[words.index("--out_dir") + 1] == name and "--overwrite" not in words


@pytest.mark.parametrize("prompt", ["Tom", "it's $HOME; ls", "-x", "--zzz", "two\nlines", '"', "", "#"])
def test_the_next_command_is_one_that_sample_reads(prompt, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(report, "plot", lambda *args: None)
    monkeypatch.setattr(generate, "stories", lambda *args, **sampling: [])
    data = random_data()._replace(meta={"corpus": "numbers", "val": dict(bytes=80, stories=10, tokens=90)})
    folder = tmp_path / f"of {prompt}"
    report.final(trainer(data, out_dir=folder, prompt=prompt), "run")
    command = shlex.split(capsys.readouterr().err.rpartition("next:  ")[2])
    options = sample.parse(command[2:])
    assert command[:2] == ["python", "sample.py"]
    assert (options.out_dir, options.prompt) == (str(folder), prompt)
