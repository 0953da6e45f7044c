"""sample.py: options, prompts, the interactive mode, errors and exit statuses."""

import dataclasses
import io
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from conftest import ROOT

import sample
from model import GPT, GPTConfig
from nanostlm import checkpoint, machine, tokenizer


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A directory with two runs of the same model: out/old and out/new."""
    folder, byte = tmp_path_factory.mktemp("runs"), tokenizer.get("byte")
    torch.manual_seed(0)
    config = GPTConfig(
        n_layer=2, n_head=4, n_embd=32, block_size=12, vocab_size=257, init="fan_in", tied=False
    )
    model = GPT(config)
    torch.nn.init.normal_(model.head.linear.weight, std=0.2)
    for name, age in (("new", 0), ("old", 100)):
        path = folder / "out" / name / "best.pt"
        path.parent.mkdir(parents=True)
        state = {"model": model.state_dict(), "model_config": dataclasses.asdict(config)}
        checkpoint.save(path, state | {"tokenizer": byte.state()})
        os.utime(path, (time.time() - age,) * 2)
    return folder


@pytest.fixture
def main(runs, monkeypatch, capsys):
    """sample.main in that directory: arguments -> (status, stdout, stderr)."""
    monkeypatch.chdir(runs)

    def call(*arguments):
        status = sample.main(["--device", "cpu", *map(str, arguments)])
        return status, *capsys.readouterr()

    return call


def command(*arguments) -> list[str]:
    return [sys.executable, str(ROOT / "sample.py"), "--device", "cpu", *arguments]


def test_sample_in_a_subprocess(runs):
    prompt = "ü" * 10
    argv = command("--prompt", prompt, "--max_new_tokens", "30")
    result = subprocess.run(argv, cwd=runs, capture_output=True)
    lines = result.stderr.decode().splitlines()
    assert result.returncode == 0
    assert (
        result.stdout.decode().startswith(prompt)
        and len(result.stdout) > 25
        and result.stdout.endswith(b"\n")
    )
    assert lines[0].replace("\\", "/").startswith("out/new/best.pt: 0.0M parameters, byte, float32 on cpu")
    assert lines[1].startswith("note: a prompt of 20 tokens is too long: ")
    assert lines[2].endswith(" tokens/s") and len(lines) == 3


def test_samples_are_separated_and_the_first_matches_a_single_sample(main):
    status, single, _ = main("--prompt", "Once", "--max_new_tokens", 20)
    assert status == 0 and single.startswith("Once") and single.endswith("\n") and "---" not in single
    assert main("--prompt", "Once", "--max_new_tokens", 20)[1] == single
    status, out, err = main("--prompt", "Once", "--max_new_tokens", 20, "--num_samples", 3)
    texts = out.removesuffix("\n").split("\n---------------\n")
    assert len(texts) == 3 and all(text.startswith("Once") for text in texts)
    assert texts[0] + "\n" == single and "60 tokens in" in err
    assert main("--prompt", "Once", "--max_new_tokens", 20, "--seed", 8)[1] != single


@pytest.mark.filterwarnings("ignore:a prompt of")
def test_prompt_sources_run_paths_and_sampling_options(main, runs, tmp_path, monkeypatch):
    (tmp_path / "prompt.txt").write_bytes("Zwölf\nBären\n".encode())
    greedy = ("--max_new_tokens", 5, "--temperature", 0)
    expected = main("--prompt", "Zwölf\nBären", *greedy)[1]
    assert expected.startswith("Zwölf\nBären") and len(expected) > 12
    assert main("--prompt", f"FILE:{tmp_path / 'prompt.txt'}", *greedy)[1] == expected
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("Zwölf\nBären\n".encode())))
    assert main("--prompt", "-", *greedy)[1] == expected
    for path in (runs / "out" / "old", runs / "out" / "new" / "best.pt"):
        assert main("--out_dir", path, "--prompt", "Zwölf\nBären", *greedy)[1] == expected
    assert "old" in main("--out_dir", runs / "out" / "old", *greedy)[2]
    for argv in ([], ["--prompt", ""], ["--prompt="]):
        status, out, _ = main(*argv, "--max_new_tokens", 9)
        assert status == 0 and len(out) > 1
    options = ("--top_k", 5, "--min_p", 0.1, "--repetition_penalty", 1.3)
    assert main("--dtype", "bfloat16", *options, *greedy)[0] == 0
    status, out, err = main("--dtype", "int8", "--num_samples", 2, *greedy)
    assert status == 0 and len(out) > 20 and "0.0M parameters, byte, int8 on cpu" in err
    full = main("--max_new_tokens", 30)[1]
    char = next(char for char in full[5:] if " " < char < "~")
    expected = full[: full.index(char)].rstrip("\ufffd")  # also without an incomplete character before it
    assert main("--max_new_tokens", 30, "--stop", "never", "--stop", char)[1] == expected + "\n"


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
def test_dtype_option_sets_the_weights_dtype(main, monkeypatch, name):
    dtypes = set()

    def write(model, *_, **__):
        dtypes.update(p.dtype for p in model.parameters())
        return iter([(0, "")])

    monkeypatch.setattr(sample, "write", write)
    assert main("--dtype", name)[0] == 0 and dtypes == {getattr(torch, name)}


def test_one_final_line_break_is_removed_from_a_prompt_file(main, tmp_path):
    (tmp_path / "prompt.txt").write_bytes(b"  One\n\n")
    assert main("--prompt", f"FILE:{tmp_path / 'prompt.txt'}", "--max_new_tokens", 1)[1].startswith("  One\n")


def test_seed_grows_with_each_interactive_prompt(main, monkeypatch):
    """The first prompt uses --seed; the same prompt again gives a different story."""
    monkeypatch.setattr("sys.stdin", io.StringIO("Once\nOnce\n"))
    status, out, _ = main("--interactive", "--max_new_tokens", 20, "--seed", 7)
    first, second = (main("--prompt", "Once", "--max_new_tokens", 20, "--seed", seed)[1] for seed in (7, 8))
    assert status == 0 and out == first + second and first != second


def test_interactive_commands(main, monkeypatch):
    """/again repeats the last prompt with the next seed, /temperature persists, others print the help."""
    stdin = "/help\nOnce\n/again\n/temperature 0\n/again\n/temperature -1\n/temperature\n/again\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(stdin))
    status, out, err = main("--interactive", "--max_new_tokens", 20, "--seed", 7)
    argv = ("--prompt", "Once", "--max_new_tokens", 20)
    sampled = [main(*argv, "--seed", seed)[1] for seed in (7, 8)]
    greedy = main(*argv, "--temperature", 0)[1]
    assert status == 0 and out == "".join([*sampled, greedy, greedy])
    assert err.count("/temperature T") == 2 and err.count("error: temperature must be 0") == 1


def test_run_is_an_argument_or_an_option(main):
    argument = main("out/old", "--start", "Once", "--seed", 3)
    option = main("--out_dir", "out/old", "--prompt", "Once", "--seed", 3)
    assert argument[:2] == option[:2] and argument[1].startswith("Once") and "out/old" in argument[2]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("out/old --out_dir out/new", "RUN and --out_dir are mutually exclusive"),
        ("--temperature -1", "temperature must be 0"),
        ("--top_p 1.5", "top_p must be between 0 and 1, not 1.5"),
        ("--top_k -3", "top_k"),
        ("--top_k many", "--top_k"),
        ("--num_samples 0", "num_samples must be between 1 and"),
        ("--max_new_tokens -5", "max_new_tokens must be between 1 and"),
        ("--temprature 1", "there is no option '--temprature'; did you mean '--temperature'?"),
        ("--zzz", "there is no option '--zzz'; --help lists all options"),
        ("--dtype int4", "--dtype"),
        ("--device teapot", "not 'teapot'"),
        ("--stop=", "must not be empty"),
        ("--out_dir nowhere", "nowhere"),
        ("--out_dir empty", "empty holds no checkpoint"),
        ("--out_dir broken.pt", "broken.pt is damaged"),
        ("--prompt FILE:nowhere.txt", "No such file or directory: 'nowhere.txt'"),
        ("--prompt FILE:latin1.txt", "FILE:latin1.txt is not UTF-8"),
        ("--prompt \udcff", "not valid Unicode"),
        ("--interactive --prompt Once", "leave out --prompt"),
    ],
)
def test_user_error_prints_one_line_and_returns_2(main, runs, arguments, message):
    (runs / "empty").mkdir(exist_ok=True)
    (runs / "latin1.txt").write_bytes("Zwölf".encode("latin1"))
    content = (runs / "out" / "new" / "best.pt").read_bytes()
    (runs / "broken.pt").write_bytes(content[: len(content) // 2])
    status, out, err = main(*arguments.split(" "))
    line = err.splitlines()[-1]
    assert status == 2 and out == "" and message in line and line.startswith("error: ")
    assert len([line for line in err.splitlines() if not line.startswith("out/new")]) == 1


def test_int8_needs_a_cpu():
    with pytest.raises(ValueError, match="--dtype int8 needs --device cpu"):
        machine.inference_dtype("int8", torch.device("meta"))


def test_missing_cpp_compiler_is_an_error_with_compile(runs):
    argv = command("--prompt", "Once", "--compile")
    result = subprocess.run(argv, cwd=runs, capture_output=True, text=True, env=os.environ | {"CXX": "/none"})
    assert result.returncode == 1 and result.stdout == ""
    expected = "error: --compile failed: no C++ compiler found; install g++ or clang++, or set CXX to one"
    assert result.stderr.splitlines()[1:] == [expected]


def test_without_any_run(main, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, out, err = main("--prompt", "Once")
    assert status == 2 and out == "" and "python train.py config/tiny.py" in err and err.count("\n") == 1


@pytest.mark.parametrize(
    "error, status",
    [
        (KeyboardInterrupt(), 130),
        (OSError(28, "No space left"), 1),
        (RuntimeError("two\nlines"), 1),
        (MemoryError(), 1),
        (torch.OutOfMemoryError("CUDA"), 1),
    ],
)
def test_failure_prints_one_line_and_returns_1(main, monkeypatch, error, status):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(sample, "write", fail)
    returned, _, err = main("--prompt", "Once")
    assert returned == status and "Traceback" not in err and err.count("\n") == (1 if status == 130 else 2)


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX pipes")
def test_closed_pipe_prints_no_traceback(runs):
    pipe, argv = subprocess.PIPE, command("--max_new_tokens", "5000")
    process = subprocess.Popen(argv, cwd=runs, stdout=pipe, stderr=pipe)
    process.stdout.read(1)
    process.stdout.close()
    assert "Traceback" not in process.stderr.read().decode() and process.wait() == 0


@pytest.mark.skipif(os.name != "posix", reason="needs a pseudo-terminal")
def test_interactive(runs):
    import pty

    controller, terminal = pty.openpty()
    process = subprocess.Popen(
        command("--interactive", "--max_new_tokens", "100000"),
        cwd=runs,
        stdin=terminal,
        stdout=terminal,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    os.close(terminal)
    timer = threading.Timer(60, process.kill)  # so that the reads below cannot block forever
    timer.start()

    def read_until(pattern: bytes) -> bytes:
        output = b""
        while pattern not in output:
            output += os.read(controller, 1000)
        return output

    try:
        read_until(b"> ")
        os.write(controller, b"Hello\n")
        read_until(b"Hello")  # the terminal's echo, then the story
        assert len(os.read(controller, 1000)) > 0
        process.send_signal(signal.SIGINT)  # ends the story, not the program
        read_until(b"> ")
        os.write(controller, b"\x04")
        _, err = process.communicate(timeout=60)
        assert process.returncode == 0 and b"Traceback" not in err
    finally:
        timer.cancel()
        process.kill()
        os.close(controller)
