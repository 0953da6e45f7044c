"""What all tests share. One thread: the models here are tiny, and more threads would only wait for each other."""

import os
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


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("cuda") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))
