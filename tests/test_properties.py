"""
Property tests: any value of any type in a setting, a recipe, meta.json or a checkpoint gives a result, or a
one-line error. The examples are the same in every run.
"""

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import settings as limits
from hypothesis import strategies as st

import train
from nanostlm import checkpoint, runs, settings
from nanostlm.data import load_data
from train import TrainConfig

SETTINGS = settings.settings_of(TrainConfig)
LIMITS = limits(derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
ODD = [
    "",
    " ",
    "1e400",
    "-0",
    "0x10",
    "1_000",
    "٣",
    "True",
    "[]",
    "-1",
    "1e30",
    "a/b",
    "..",
    "9" * 50,
    "0:1,1:nan",
]
JUNK = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=5,
)
WORDS = [
    *SETTINGS,
    "=",
    "=",
    "\n",
    "\n",
    " ",
    "1",
    "2.5",
    "True",
    '"x"',
    "-",
    "*",
    "**",
    "(",
    ")",
    "[",
    "#",
    "x",
]


@pytest.fixture
def folder(tmp_path, monkeypatch, corpus) -> Path:
    """The working directory, with the corpus `mini` in data/ and a run in out/run."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(corpus, "data")
    shape = dict(dataset="mini", tokenizer="byte", n_layer=1, n_head=1, n_embd=8, block_size=16, batch_size=2)
    shape |= dict(max_iters=2, threads=1, dtype="float32", device="cpu", out_dir="out/run")
    monkeypatch.setattr("nanostlm.report.final", lambda *_: None)
    assert train.main([f"--{name}={value}" for name, value in shape.items()]) == 0
    return tmp_path


def valid(call, *args) -> bool:
    """Whether call(*args) returns; otherwise it must raise a ValueError of one line."""
    try:
        call(*args)
        return True
    except ValueError as error:
        assert 0 < len(str(error)) < 2000 and "\n" not in str(error).strip(), str(error)
        return False


def paths(value, path=()) -> list[tuple]:
    """The keys that lead to every value inside nested dicts and lists."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [found for key, inner in items for found in ((*path, key), *paths(inner, (*path, key)))]


def changed(value, path: tuple, new, remove: bool):
    """A copy of `value` in which the value at `path` is replaced or removed."""
    value = copy.deepcopy(value)
    inner = value
    for key in path[:-1]:
        inner = inner[key]
    if remove:
        del inner[path[-1]]
    else:
        inner[path[-1]] = new
    return value


@limits(LIMITS, max_examples=300)
@given(name=st.sampled_from(sorted(SETTINGS)), value=st.one_of(SCALARS, st.sampled_from(ODD)))
def test_any_value_of_a_setting_gives_a_plan_or_one_line(folder, capsys, name, value):
    threads = torch.get_num_threads()
    shape = [
        "--dataset=mini",
        "--tokenizer=byte",
        "--device=cpu",
        "--max_iters=0",
        "--n_embd=8",
        "--n_head=1",
    ]
    status = train.main([*shape, f"--{name}={value}".replace("\0", "")])
    torch.set_num_threads(threads)
    err = capsys.readouterr().err.splitlines()
    if status == 0:
        assert err[-1].startswith("needs ") or name == "max_iters"
    else:
        assert status == 2 or name in ("dataset", "data_dir", "init_from"), err
        assert sum(line.startswith("error: ") for line in err) == 1 and err[-1].startswith("error: ")


@limits(LIMITS, max_examples=400)
@given(text=st.lists(st.sampled_from(WORDS), max_size=30).map("".join) | st.text(max_size=60))
def test_any_recipe_is_read_or_gives_one_line(folder, text):
    path = folder / "recipe.py"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    valid(settings.read_recipe, path, TrainConfig)


@limits(LIMITS, max_examples=300)
@given(data=st.data())
def test_any_meta_json_is_read_or_gives_one_line(folder, data):
    place = folder / "data" / "mini" / "byte"
    meta = json.loads((folder / "meta.backup").read_text()) if (folder / "meta.backup").exists() else None
    if meta is None:
        shutil.copy(place / "meta.json", folder / "meta.backup")
        meta = json.loads((folder / "meta.backup").read_text())
    path, new, remove = data.draw(st.sampled_from(paths(meta))), data.draw(JUNK), data.draw(st.booleans())
    (place / "meta.json").write_text(json.dumps(changed(meta, path, new, remove)))
    valid(load_data, place)


@limits(LIMITS, max_examples=250)
@given(data=st.data())
def test_any_checkpoint_is_read_or_gives_one_line(folder, data):
    state = torch.load(folder / "out" / "run" / "latest.pt", weights_only=True)
    path, new, remove = data.draw(st.sampled_from(paths(state))), data.draw(JUNK), data.draw(st.booleans())
    file = folder / "other" / "latest.pt"
    file.parent.mkdir(exist_ok=True)
    checkpoint.save(file, changed(state, path, new, remove))
    valid(checkpoint.load, file)
    defaults = {setting.name: setting.default for setting in SETTINGS.values()}
    valid(runs.last_state, file.parent, defaults)
