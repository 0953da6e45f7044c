"""The final report: failures in it are warnings. Samples during training."""

import shlex
from pathlib import Path

import pytest
from helpers import bit_equal, cli_args, metrics, run_state

import train
from nanostlm import generate, report, runs, tasks

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
    assert f"next:  {shlex.join(['python', 'sample.py', '--out_dir', name, '--prompt', name])}" in err
    assert Path(name, "loss.png").exists()
    report.plot_runs([Path(name), Path(name)], "runs.png")


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
