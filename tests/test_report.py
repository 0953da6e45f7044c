"""The end of a run: nothing that may fail there fails the run. Samples during training."""

import shlex
from pathlib import Path

import pytest
from helpers import kept, lines, same, words

import train
from nanostlm import generate, report, runs, tasks

OPTIONAL = report.optional  # before a fixture replaces it
PARTS = {  # what fails, and what the warning calls it
    "report.plot": "loss.png",
    "runs.folders_of": "the comparison with an earlier run",
    "report.load_best": "the report",
    "tasks.validation_loss": "the score",
    "generate.stories": "the stories",
}


@pytest.mark.parametrize("part", PARTS)
def test_a_failure_after_training_is_a_warning(tmp_path, monkeypatch, corpus, capsys, part):
    def fail(*_, **__):
        raise KeyError("something")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(report, "optional", OPTIONAL)
    module, name = part.split(".")
    monkeypatch.setattr(
        {"report": report, "runs": runs, "tasks": tasks, "generate": generate}[module], name, fail
    )
    assert train.main(words(corpus, max_iters=4)) == 0
    out, err = capsys.readouterr()
    assert f"WARNING: {PARTS[part]} failed: KeyError: 'something'" in err and err.count("WARNING") == 1
    assert "val_bpb: " in out and "next:  python sample.py" in err


@pytest.mark.parametrize("name", [r"m$\foo$_{", "$x", "[bold]a", "a b'c", "%s{0}", "_hidden", "ünï"])
def test_names_and_prompts_are_text(tmp_path, monkeypatch, corpus, capsys, name):
    """User text is not markup for the curve, the terminal or the shell."""
    monkeypatch.chdir(tmp_path)
    assert train.main(words(corpus, max_iters=4, out_dir=name, prompt=name)) == 0
    said = capsys.readouterr().err
    assert f"next:  {shlex.join(['python', 'sample.py', '--out_dir', name, '--prompt', name])}" in said
    assert Path(name, "loss.png").exists()
    report.plot_runs([Path(name), Path(name)], "runs.png")


def test_samples_during_training_change_nothing(tmp_path, monkeypatch, corpus, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(report, "final", lambda *_: None)
    for every in (0, 6):
        settings = words(corpus, out_dir=f"every{every}", sample_interval=every, dropout=0.1, prompt="Tom")
        assert train.main(settings) == 0
        shown = [line for line in capsys.readouterr().err.splitlines() if line.startswith("    Tom")]
        assert len(shown) == (4 if every else 0), "at steps 0, 6, 12 and 18; the final report has its own"
    assert lines("every0") == lines("every6") and same(kept("every0"), kept("every6"))
