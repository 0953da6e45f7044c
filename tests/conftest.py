"""What all tests share. One thread: the models here are tiny, and more threads would wait for each other."""

import contextlib
import os
import random
import signal
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # also for the programs that tests start
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # tests never reach for the network

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def tinystories() -> Path:
    """A local piece of TinyStories, for those who have one beside the repository."""
    folder = ROOT.parent / "shared" / "tinystories"
    if not folder.is_dir():
        pytest.skip("needs ../shared/tinystories")
    return folder


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """A data_dir that holds the corpus `mini` as bytes: 40 short stories, about 3,000 ids."""
    import prepare

    folder, draw = tmp_path_factory.mktemp("corpus"), random.Random(0)
    words = "Tom Mia Ben saw a big red dog cat ball and she was happy . He ran to the park".split()
    stories = (" ".join(draw.choices(words, k=draw.randint(8, 30))) for _ in range(40))
    (folder / "mini.txt").write_text("\n\n".join(stories), encoding="utf-8")
    prepare.prepare("mini", "byte", source=str(folder / "mini.txt"), data_dir=folder / "data")
    return folder / "data"


@pytest.fixture(autouse=True)
def nothing_is_optional(monkeypatch):
    """What may fail with a warning at the end of a run, such as its curve, fails a test."""
    from nanostlm import report

    monkeypatch.setattr(report, "optional", contextlib.nullcontext)


@pytest.fixture
def here(tmp_path, monkeypatch, corpus, capsys):
    """
    here(out_dir, key=value, ..., "--resume", stop_after=n) -> exit status of train.main, in this
    process and tmp_path, on micro settings unless alone=True. Its curve and stories are left out; stop_after:
    SIGTERM arrives in update n. here.said is what it said.
    """
    from helpers import MICRO

    import train
    from nanostlm import report

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(report, "final", lambda *args: None)

    def go(out_dir, *words, stop_after=0, alone=False, **changes):
        made = {"data_dir": corpus} | (changes if alone else MICRO | changes)
        made |= {"out_dir": out_dir} if out_dir else {}
        step = train.Trainer.train_step

        def stopping(self, n):
            if n + 1 == stop_after:
                self.requests.stop = signal.SIGTERM
            return step(self, n)

        with monkeypatch.context() as patch:
            patch.setattr(train.Trainer, "train_step", stopping)
            status = train.main([f"--{key}={value}" for key, value in made.items()] + [str(w) for w in words])
        go.said = capsys.readouterr().err
        return status

    return go


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("cuda") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))
