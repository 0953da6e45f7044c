"""nanostlm/report.py: the plan, the console, loggers, samples during training, the final report."""

import json
import math
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import (
    MICRO,
    ROOT,
    bit_equal,
    cli_args,
    config,
    cpu_machine,
    metrics,
    random_data,
    run_script,
    run_state,
    trainer,
)

import prepare
import train
from nanostlm import generate, machine, report, runs, tasks

# ----------------------------------------------------------------------------------------------------------
# The plan


def test_plan_numbers(monkeypatch):
    """Epochs of the whole run, memory of one micro-batch."""
    monkeypatch.setattr(machine.Machine, "base_memory", lambda self: 0)
    data, machine_of = random_data(), cpu_machine()
    data = data._replace(meta={"train": {"stories": 70}})

    def plan(**changes) -> str:
        return report.plan(config(**changes), data, machine_of, iters=350)

    shape = dict(batch_size=4, gradient_accumulation_steps=3, n_embd=128, block_size=64)
    text = plan(**shape)
    assert "12 rows x 64 = 768 tokens a step; 350 steps = 0.3M tokens = 384.00 epochs" in text
    assert "70 stories" in text and "not compiled" in text
    c = config(**shape).model
    for rows in (4, 400):
        memory = c.memory(rows * 64, 4) / 2**20
        assert f"about {memory:,.0f} MB of memory" in plan(**shape | dict(batch_size=rows))


@pytest.mark.slow  # measures memory, which other processes influence
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads memory usage from /proc")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_planned_memory_matches_peak(dtype, tmp_path, corpus):
    shape = dict(n_layer=4, n_embd=192, n_head=4, block_size=128, batch_size=8, max_iters=3, dtype=dtype)
    argv = [f"--{key}={value}" for key, value in (MICRO | shape | {"data_dir": corpus}).items()]
    err = run_script(ROOT / "train.py", *argv, "--out_dir=run", cwd=tmp_path).stderr
    planned = int(re.search(r"about ([\d,]+) MB of memory", err)[1].replace(",", ""))
    peak = int(re.search(r"peak memory ([\d,]+) MB", err)[1].replace(",", ""))
    assert planned == pytest.approx(peak, rel=0.2)


# ----------------------------------------------------------------------------------------------------------
# Console and loggers


def test_console_without_terminal(capsys):
    """Prints the first update, every tenth logged update with the remaining time, and every evaluation."""
    with report.Console(trainer(max_iters=100, log_interval=2)) as console:
        for step in (1, *range(2, 42, 2)):
            console.show({"step": step, "split": "train", "loss": 2.5, "lr": 0.01, "tokens_per_s": 128})
        console.show({"step": 41, "split": "val", "loss": 2.25, "bpb": 1.125})
    first, second, third, val = capsys.readouterr().err.splitlines()
    assert first.split() == "step 1 loss 2.5000 lr 0.01 128 tokens/s 50 s left".split()
    assert second.split()[1] == "20" and second.endswith(" 40 s left")
    assert third.split()[1] == "40" and third.endswith(" 30 s left")
    assert val.split() == "step 41 val loss 2.2500 1.1250 bits per byte".split()


def test_loggers_are_imported_only_when_selected(tmp_path):
    code = """if 1:
        import sys, train
        loaded = {name.split(".")[0] for name in sys.modules}
        unwanted = {"wandb", "tensorboard", "matplotlib", "datasets", "transformers", "tokenizers",
                    "tiktoken"}
        assert not loaded & unwanted, loaded & unwanted"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_tensorboard(main):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    assert main("run", logger="tensorboard", max_iters=6) == 0
    logged = events.EventAccumulator("run").Reload()
    assert set(logged.Tags()["scalars"]) >= {"train/loss", "val/loss", "val/bpb", "train/lr"}
    expected = {line["step"]: line["loss"] for line in metrics("run", "val")}
    assert {e.step: e.value for e in logged.Scalars("val/loss")} == pytest.approx(expected)


def test_logger_that_is_not_installed(main, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert main("run", logger="wandb") == 2
    assert "pip install wandb" in main.stderr and "Traceback" not in main.stderr


def test_wandb(main, monkeypatch):
    logged, init_kwargs = [], {}
    run = SimpleNamespace(log=lambda line, step: logged.append((step, line)))
    monkeypatch.setitem(
        sys.modules, "wandb", SimpleNamespace(init=lambda **kwargs: init_kwargs.update(kwargs) or run)
    )
    assert main("run", logger="wandb", max_iters=6) == 0
    assert init_kwargs["config"]["max_iters"] == 6
    assert [step for step, _ in logged] == [line["step"] for line in metrics("run")]


def test_samples_do_not_change_training(tmp_path, monkeypatch, corpus, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(report, "final", lambda *_: None)
    for interval in (0, 6):
        settings = cli_args(
            corpus, out_dir=f"every{interval}", sample_interval=interval, dropout=0.1, prompt="Tom"
        )
        assert train.main(settings) == 0
        samples = [line for line in capsys.readouterr().err.splitlines() if line.startswith("    Tom")]
        assert len(samples) == (4 if interval else 0), "at steps 0, 6, 12 and 18"
    assert metrics("every0") == metrics("every6") and bit_equal(run_state("every0"), run_state("every6"))


# ----------------------------------------------------------------------------------------------------------
# The final report


def test_final_report(tmp_path, monkeypatch, corpus, capsys):
    """The end of a real run: loss.png, summary with that of the previous run, samples, the next command."""
    monkeypatch.chdir(tmp_path)
    argv = [f"--{k}={v}" for k, v in MICRO.items()] + [
        f"--data_dir={corpus}",
        "--prompt=Tom",
        "--max_iters=4",
    ]
    for _ in range(2):
        assert train.main(argv) == 0
    out, err = capsys.readouterr()
    assert re.search(r"^val_bpb: \d\.\d{4}$", out, re.M) and out.count("val_bpb") == 2, (
        "once per run, on stdout"
    )
    assert "in out/run\n" in err and "in out/run-2\n" in err and "bits per byte" in err
    assert Path("out/run-2/loss.png").read_bytes().startswith(b"\x89PNG")
    assert err.count("\nTom") == 6 and "next:  python sample.py --out_dir=out/run-2 --prompt=Tom" in err
    assert train.main([*argv, "--eval_tokens=50", "--seed=1"]) == 0, "compared: same data"
    assert "in out/run-2\n" in capsys.readouterr().err
    config = json.loads(Path("out/run-3/config.json").read_text())
    assert config["settings"]["seed"] == 1 and config["settings"]["model"]["vocab_size"] == 257
    assert config["command"][0] == "train.py" and "--seed=1" in config["command"]
    assert config["provenance"]["torch"] == torch.__version__
    Path("other.txt").write_text("\n\n".join(f"A story of {i} dogs and one cat." for i in range(99)))
    prepare.prepare("other", "byte", source="other.txt", data_dir="data")
    assert train.main([*argv, "--dataset=other", "--data_dir=data"]) == 0, "not compared: other data"
    err = capsys.readouterr().err
    assert "in out/run-4\n" in err and "in out/run-3\n" not in err


def test_summary_reports_updates_made_and_best_evaluations(tmp_path, monkeypatch, capsys):
    """Of this run and of the newest earlier run of the same recipe."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(report, "plot", lambda *args: None)
    monkeypatch.setattr(generate, "stories", lambda *args, **sampling: [])
    data = random_data()._replace(meta={"corpus": "random", "val": dict(bytes=80, stories=10, tokens=90)})
    for age, name in ((200, "run"), (100, "run-2"), (0, "run-3")):
        t = trainer(data, out_dir=Path("out", name), max_iters=100)
        for step, loss in ((1, 3.0), (2, 2.0 + age / 1000), (3, 2.5)):
            t.log(step, {"loss": loss, "bpb": loss / 2}, split="val")
        t.directory.write_config({"data": t.fingerprint})
        os.utime(Path("out", name), (time.time() - age,) * 2)
    t.progress.step = 35
    report.final(t, "run")
    err = capsys.readouterr().err
    assert "35 updates, 0.00M tokens = 3.20 epochs" in err  # 35 * 4 * 16 / 700
    assert "best val loss 2.0000 nats a token, 1.0000 bits per byte (step 2) in out/run-3\n" in err
    assert "best val loss 2.1000 nats a token, 1.0500 bits per byte (step 2) in out/run-2\n" in err
    assert err.count("best val loss") == 2


def test_entropy_in_the_plot_is_in_nats_per_token(tmp_path, monkeypatch):
    """The unit of the losses in the plot. End-of-text counts as one byte."""
    monkeypatch.chdir(tmp_path)
    val, floors = dict(bytes=80, stories=10, tokens=45), []
    monkeypatch.setattr(report, "plot", lambda metrics, floor: floors.append(floor))
    monkeypatch.setattr(generate, "stories", lambda *args, **sampling: [])
    for entropy in ({"floor_bpb": 0.5}, {}):
        data = random_data()._replace(meta={"corpus": "random", "val": val, **entropy})
        report.final(trainer(data, out_dir="run", prompt="Tom"), "run")
    assert floors == [pytest.approx(0.5 * math.log(2) * 2), None]


OPTIONAL = report.optional  # before the autouse fixture replaces it
PARTS = {  # the failing function -> its name in the warning
    "report.plot": "loss.png",
    "runs.folders_of": "the comparison with an earlier run",
    "report.load_best": "the report",
    "tasks.validation_loss": "the score",
    "generate.stories": "the stories",
}


@pytest.mark.parametrize("part", PARTS)
def test_failure_after_training_is_a_warning(tmp_path, monkeypatch, corpus, capsys, part):
    def fail(*_, **__):
        raise KeyError("something")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(report, "optional", OPTIONAL)
    module, name = part.split(".")
    monkeypatch.setattr(
        {"report": report, "runs": runs, "tasks": tasks, "generate": generate}[module], name, fail
    )
    assert train.main(cli_args(corpus, max_iters=4)) == 0
    out, err = capsys.readouterr()
    assert f"WARNING: {PARTS[part]} failed: KeyError: 'something'" in err and err.count("WARNING") == 1
    assert "val_bpb: " in out and "next:  python sample.py" in err


@pytest.mark.parametrize("name", [r"m$\foo$_{", "$x", "[bold]a", "a b'c", "%s{0}", "_hidden", "ünï"])
def test_names_and_prompts_are_not_markup(tmp_path, monkeypatch, corpus, capsys, name):
    """Neither in the plot, nor in the terminal, nor in the shell."""
    monkeypatch.chdir(tmp_path)
    assert train.main(cli_args(corpus, max_iters=4, out_dir=name, prompt=name)) == 0
    err = capsys.readouterr().err
    assert f"next:  {shlex.join(['python', 'sample.py', f'--out_dir={name}', f'--prompt={name}'])}" in err
    assert Path(name, "loss.png").exists()
    report.plot_runs([Path(name), Path(name)], "runs.png")
