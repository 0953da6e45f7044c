"""The benchmarks: each explains itself; without a peer they run at a size where nothing is measured."""

import importlib
import json
import math
import sys
import time

import pytest
import torch
from conftest import ROOT

sys.path.insert(0, str(ROOT / "bench"))
import common  # noqa: E402

SCRIPTS = sorted(path.stem for path in (ROOT / "bench").glob("*.py") if path.stem != "common")


@pytest.fixture
def bench(corpus, capsys):
    """bench(script, words...) -> what it printed before its last line, and that line's JSON."""

    def go(script: str, *words, data: bool = True) -> tuple[str, dict]:
        options = ["--dataset", "mini", "--tokenizer", "byte", "--data_dir", corpus] if data else []
        importlib.import_module(script).main([str(word) for word in [*options, *words]])
        *said, last = capsys.readouterr().out.strip().splitlines()
        return "\n".join(said), json.loads(last, parse_constant=pytest.fail)

    return go


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_says_how_to_run_it(script, capsys):
    with pytest.raises(SystemExit) as end:
        importlib.import_module(script).main(["--help"])
    said = capsys.readouterr().out
    assert end.value.code == 0 and f"python bench/{script}.py" in said
    assert script in (ROOT / "bench" / "README.md").read_text(encoding="utf-8")


# ----------------------------------------------------------------------------------------------------------
# What they share


def test_a_program_is_watched_line_by_line_with_its_own_memory(tmp_path):
    text = "import time; x = bytearray(80 << 20); print('one'); time.sleep(0.2); print('two', flush=True)"
    ran = common.run([sys.executable, "-c", text])
    assert [line for _, line in ran.lines] == ["one", "two", ""] and ran.status == 0
    assert 0 < ran.find("one")[0] < ran.find("two")[0] <= ran.seconds
    assert 80 < ran.peak_mb < 130  # not that of this process, which holds torch
    with pytest.raises(SystemExit, match="no line has 'three'"):
        ran.find("three")


def test_a_program_ends_where_its_line_was_seen():
    began = time.perf_counter()
    ran = common.run([sys.executable, "-c", "import time; print('here'); time.sleep(60)"], until="^here")
    assert time.perf_counter() - began < 30 and ran.lines[-1][1] == "here" and math.isnan(ran.peak_mb)


def test_a_program_that_fails_says_why():
    with pytest.raises(SystemExit, match="no good"):
        common.run([sys.executable, "-c", "raise SystemExit('no good')"])
    assert common.run([sys.executable, "-c", "raise SystemExit(2)"], check=False).status == 2


def test_sides_are_measured_in_turn():
    order = []
    sides = {name: lambda name=name: order.append(name) or float(len(order)) for name in "ab"}
    found = common.in_turn(sides, 3)
    assert order == list("ababab") and found == {"a": [1.0, 3.0, 5.0], "b": [2.0, 4.0, 6.0]}
    assert common.medians(found) == {"a": 3.0, "b": 4.0}


@pytest.mark.parametrize(
    "name, peak",
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
    ],
)
def test_cards_are_known_by_name(name, peak):
    assert common.card(name)[0] == peak


def test_a_card_that_is_not_in_the_table_is_unknown():
    assert common.card("NVIDIA L40") is None and common.card("Some Other 9000") is None


def test_a_table_has_columns_and_a_dash_for_nothing(capsys):
    common.table(["name", "rate"], [["a", 12345.6], ["long name", math.nan], ["c", None]])
    assert capsys.readouterr().out.splitlines() == [
        "name         rate",
        "a          12,346",
        "long name       -",
        "c               -",
    ]


def test_nanogpt_gets_our_bins_and_its_checkout_stays_as_it_is(tmp_path, corpus):
    import pickle

    from nanostlm import data as datasets

    data, there = datasets.load_data(corpus / "mini" / "byte"), tmp_path / "there"
    (there / "config").mkdir(parents=True)
    (there / "train.py").write_text("pass")
    before = sorted(there.rglob("*"))
    made = common.nanogpt(str(there), tmp_path / "copy", data)
    assert sorted(there.rglob("*")) == before
    bins = made / "data" / "ours"
    assert (bins / "train.bin").read_bytes() == data.train.tobytes()
    assert pickle.loads((bins / "meta.pkl").read_bytes()) == {"vocab_size": 320}  # 257, rounded up to 64s
    with pytest.raises(SystemExit, match="has no train.py"):
        common.nanogpt(str(tmp_path), tmp_path / "other", data)


# ----------------------------------------------------------------------------------------------------------
# The scripts, with nothing to be held against


def test_floors_are_marked_as_not_measured(bench, tmp_path):
    said, made = bench("floors", "--data_dir", tmp_path, data=False)
    assert "NOT MEASURED" in said and made["measured"] is False
    names = {path.stem for path in (ROOT / "config").glob("*.py")} - {"__init__", "finetune"}
    assert {one["recipe"] for one in made["recipes"]} == names
    slm = next(one for one in made["recipes"] if one["recipe"] == "slm" and "H100" in one["card"])
    assert 465e6 < slm["tokens_a_pass"] < 480e6
    assert slm["tokens_per_s"] * slm["flops_a_token"] == pytest.approx(0.4 * 989e12)


def test_train_speed(bench):
    words = "--shapes 1,1,16 --block_size 16 --batch_size 2 --steps 1 --repeats 1 --matrix 16".split()
    said, made = bench("train_speed", *words)
    assert "ours" in said and made["shapes"][0]["tokens_per_s"]["ours"] > 0


def test_profile_step_parts_add_up(bench):
    words = "--repeats 2 --matrix 16 --copied 4096 -- --n_layer=1 --block_size=16 --batch_size=2".split()
    said, made = bench("profile_step", *words)
    assert sum(made["parts"].values()) == pytest.approx(made["seconds"]) and "floor by bytes" in said
    assert set(made["parts"]) == {"data", "forward", "backward", "optimizer", "rest"} and made["tokens"] == 32
    assert torch.Tensor.backward.__qualname__ == "Tensor.backward"  # put back


def test_attention(bench):
    assert len(bench("attention", "--lengths", 8, "--repeats", 1, data=False)[1]["rows"]) == 6


def test_ablation_lists_variants_that_the_recipe_takes(capsys):
    import ablation

    import train
    from nanostlm.settings import build, read_recipe

    default = read_recipe(ROOT / "config" / "tiny.py", train.TrainConfig)
    for name, settings in ablation.VARIANTS.items():
        c = build(train.TrainConfig, default | settings | {"vocab_size": 512})
        c.validate()
        assert " " not in name
    ablation.main(["--list"])
    assert "--mlp=swiglu" in capsys.readouterr().out


# ----------------------------------------------------------------------------------------------------------
# Those that start programs: seconds each


@pytest.mark.slow
def test_ablation_goes_on_where_it_was(bench, tmp_path):
    words = ["--only", "base", "swiglu", "relu2", "--seeds", 1, "--iters", 1, "--eval_stories", 1]
    words += ["--out", tmp_path / "made.jsonl"]
    made = bench("ablation", *words)[1]["results"]["iters"]
    assert [one["variant"] for one in made] == ["base", "swiglu", "relu2"]
    assert made[0]["bpb"] == made[1]["bpb"] != made[2]["bpb"]  # swiglu is the recipe's own: one run for both
    assert len((tmp_path / "made.jsonl").read_text().splitlines()) == 2
    began = time.perf_counter()
    assert bench("ablation", *words)[1]["results"]["iters"] == made and time.perf_counter() - began < 2


@pytest.mark.slow
def test_time_to_quality_counts_the_shortest_run_that_reaches_the_target(bench):
    words = "--target 99 --repeats 1 --ours_iters 2 1 --eval_tokens 64 -- --batch_size=1".split()
    said, made = bench("time_to_quality", *words)
    assert made["runs"][0]["ours"]["iters"] == 1 and "reached in 1 of 1 runs" in said


@pytest.mark.slow
def test_memory_and_start(bench):
    assert bench("memory", "--steps", 1, "--repeats", 1, "--batch_size", 1)[1]["peak_mb"]["ours"] > 50
    said, made = bench("start", "--repeats", 1, "--imports", 2)
    assert made["seconds"]["ours"] > made["ours_at"]["run set up"] and "torch" in said


@pytest.mark.slow
def test_prepare_speed(bench):
    words = "--mb 0.05 --sizes 0.05 --tokenizers bpe300 --repeats 1 --workers 1".split()
    made = bench("prepare_speed", *words, data=False)[1]
    assert made["peak_mb"]["0.05 MB, bpe300"] > 10 and len(made["mb_per_s"]) == 3


@pytest.mark.slow
def test_generation(bench):
    words = "--n_layer 1 --n_embd 48 --block_size 32 --tokens 8 --window_tokens 1 --repeats 1".split()
    said, made = bench("generation", *words, "--streams", 1, "--dtype", "float32", "float7", data=False)
    rates = {one["program"]: one["tokens_per_s"] for one in made["rates"]}
    assert rates["sample.py float32, 1 stream"] > 0 and rates["sample.py float7, 1 stream"] is None


@pytest.mark.slow
def test_curve_draws_our_side_alone(bench, tmp_path):
    words = ["--iters", 4, "--points", 2, "--eval_tokens", 64, "--out", tmp_path / "curve.png"]
    made = bench("curve", *words)[1]["curves"]
    ((_, curve),) = made.items()
    assert len(curve) == 3 and curve[0][0] < curve[-1][0], "at the start, in the middle, at the end"
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
