"""Shared fixtures. Tests use one thread: the models are tiny, and more threads would only add overhead."""

import contextlib
import os
import random
import signal
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # also in subprocesses
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # tests use no network

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def tinystories() -> Path:
    """A local part of TinyStories in ../shared; skips the test if it is missing."""
    folder = ROOT.parent / "shared" / "tinystories"
    if not folder.is_dir():
        pytest.skip("needs ../shared/tinystories")
    return folder


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """A data_dir with the corpus `mini` and the byte tokenizer: 40 short stories, about 3,000 ids."""
    import prepare

    folder, rng = tmp_path_factory.mktemp("corpus"), random.Random(0)
    words = "Tom Mia Ben saw a big red dog cat ball and she was happy . He ran to the park".split()
    stories = (" ".join(rng.choices(words, k=rng.randint(8, 30))) for _ in range(40))
    (folder / "mini.txt").write_text("\n\n".join(stories), encoding="utf-8")
    prepare.prepare("mini", "byte", source=str(folder / "mini.txt"), data_dir=folder / "data")
    return folder / "data"


@pytest.fixture(autouse=True)
def optional_parts_must_succeed(monkeypatch):
    """Let failures that are only warnings at the end of a run, such as of loss.png, fail the test."""
    from nanostlm import report

    monkeypatch.setattr(report, "optional", contextlib.nullcontext)


@pytest.fixture
def main(tmp_path, monkeypatch, corpus, capsys):
    """
    main(out_dir, "--resume", ..., key=value, ..., stop_after=n) runs train.main in this process and in
    tmp_path and returns its exit status; main.stderr is what it printed. Settings are MICRO with `changes`,
    or `changes` alone with micro=False. With stop_after, SIGTERM arrives in update n. No final report.
    """
    from helpers import MICRO

    import train
    from nanostlm import report

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(report, "final", lambda *args: None)

    def run(out_dir, *args, stop_after=0, micro=True, **changes):
        settings = {"data_dir": corpus} | (MICRO | changes if micro else changes)
        settings |= {"out_dir": out_dir} if out_dir else {}
        step = train.Trainer.train_step

        def stop_at(self, n):
            if n + 1 == stop_after:
                self.requests.stop = signal.SIGTERM
            return step(self, n)

        with monkeypatch.context() as patch:
            patch.setattr(train.Trainer, "train_step", stop_at)
            status = train.main(
                [f"--{key}={value}" for key, value in settings.items()] + [str(a) for a in args]
            )
        run.stderr = capsys.readouterr().err
        return status

    return run


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("cuda") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))
