"""The benchmarks: --help, shared functions, and runs without a peer, at sizes too small to mean anything."""

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
    """bench(script, *argv) runs a benchmark -> (stdout without its last line, the JSON of its last line)."""

    def run(script: str, *argv, data: bool = True) -> tuple[str, dict]:
        options = ["--dataset", "mini", "--tokenizer", "byte", "--data_dir", corpus] if data else []
        importlib.import_module(script).main([str(arg) for arg in [*options, *argv]])
        *lines, last = capsys.readouterr().out.strip().splitlines()
        return "\n".join(lines), json.loads(last, parse_constant=pytest.fail)

    return run


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_shows_how_to_run_each_script(script, capsys):
    with pytest.raises(SystemExit) as excinfo:
        importlib.import_module(script).main(["--help"])
    help_text = capsys.readouterr().out
    assert excinfo.value.code == 0 and f"python bench/{script}.py" in help_text
    assert script in (ROOT / "bench" / "README.md").read_text(encoding="utf-8")


# ----------------------------------------------------------------------------------------------------------
# Shared functions


def test_run_times_lines_and_measures_peak_memory(tmp_path):
    text = "import time; x = bytearray(80 << 20); print('one'); time.sleep(0.2); print('two', flush=True)"
    ran = common.run([sys.executable, "-c", text])
    assert [line for _, line in ran.lines] == ["one", "two", ""] and ran.status == 0
    assert 0 < ran.find("one")[0] < ran.find("two")[0] <= ran.seconds
    assert 80 < ran.peak_mb < 130  # does not include this process, which has imported torch
    with pytest.raises(SystemExit, match="no line has 'three'"):
        ran.find("three")


def test_run_stops_at_the_line_given_by_until():
    start = time.perf_counter()
    ran = common.run([sys.executable, "-c", "import time; print('here'); time.sleep(60)"], until="^here")
    assert time.perf_counter() - start < 30 and ran.lines[-1][1] == "here" and math.isnan(ran.peak_mb)


def test_run_reports_the_output_of_a_failed_program():
    with pytest.raises(SystemExit, match="no good"):
        common.run([sys.executable, "-c", "raise SystemExit('no good')"])
    assert common.run([sys.executable, "-c", "raise SystemExit(2)"], check=False).status == 2


def test_in_turn_alternates_sides():
    order = []
    sides = {name: lambda name=name: order.append(name) or float(len(order)) for name in "ab"}
    measured = common.in_turn(sides, 3)
    assert order == list("ababab") and measured == {"a": [1.0, 3.0, 5.0], "b": [2.0, 4.0, 6.0]}
    assert common.medians(measured) == {"a": 3.0, "b": 4.0}


@pytest.mark.parametrize(
    "name, peak",
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
    ],
)
def test_card_is_looked_up_by_name(name, peak):
    assert common.card(name)[0] == peak


def test_unknown_card():
    assert common.card("NVIDIA L40") is None and common.card("Some Other 9000") is None


def test_table_aligns_columns_and_prints_a_dash_for_missing_values(capsys):
    common.table(["name", "rate"], [["a", 12345.6], ["long name", math.nan], ["c", None]])
    assert capsys.readouterr().out.splitlines() == [
        "name         rate",
        "a          12,346",
        "long name       -",
        "c               -",
    ]


def test_nanogpt_copy_uses_our_bins_and_leaves_the_checkout_unchanged(tmp_path, corpus):
    import pickle

    from nanostlm import data as datasets

    data, checkout = datasets.load_data(corpus / "mini" / "byte"), tmp_path / "there"
    (checkout / "config").mkdir(parents=True)
    (checkout / "train.py").write_text("pass")
    before = sorted(checkout.rglob("*"))
    copy = common.nanogpt(str(checkout), tmp_path / "copy", data)
    assert sorted(checkout.rglob("*")) == before
    bins = copy / "data" / "ours"
    assert (bins / "train.bin").read_bytes() == data.train.tobytes()
    assert pickle.loads((bins / "meta.pkl").read_bytes()) == {"vocab_size": 320}  # 257, to a multiple of 64
    with pytest.raises(SystemExit, match="has no train.py"):
        common.nanogpt(str(tmp_path), tmp_path / "other", data)


# ----------------------------------------------------------------------------------------------------------
# The scripts without a peer


def test_floors_are_marked_as_not_measured(bench, tmp_path):
    out, result = bench("floors", "--data_dir", tmp_path, data=False)
    assert "NOT MEASURED" in out and result["measured"] is False
    names = {path.stem for path in (ROOT / "config").glob("*.py")} - {"__init__", "finetune"}
    assert {row["recipe"] for row in result["recipes"]} == names
    slm = next(row for row in result["recipes"] if row["recipe"] == "slm" and "H100" in row["card"])
    assert 465e6 < slm["tokens_a_pass"] < 480e6
    assert slm["tokens_per_s"] * slm["flops_a_token"] == pytest.approx(0.4 * 989e12)


def test_train_speed(bench):
    argv = "--shapes 1,1,16 --block_size 16 --batch_size 2 --steps 1 --repeats 1 --matrix 16".split()
    out, result = bench("train_speed", *argv)
    assert "ours" in out and result["shapes"][0]["tokens_per_s"]["ours"] > 0


def test_profile_step_parts_add_up(bench):
    argv = "--repeats 2 --matrix 16 --copied 4096 -- --n_layer=1 --block_size=16 --batch_size=2".split()
    out, result = bench("profile_step", *argv)
    assert sum(result["parts"].values()) == pytest.approx(result["seconds"]) and "lower bound by bytes" in out
    assert (
        set(result["parts"]) == {"data", "forward", "backward", "optimizer", "rest"}
        and result["tokens"] == 32
    )
    assert torch.Tensor.backward.__qualname__ == "Tensor.backward"  # restored


def test_attention(bench):
    assert len(bench("attention", "--lengths", 8, "--repeats", 1, data=False)[1]["rows"]) == 6


def test_ablation_variants_are_valid_settings(capsys):
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
# Scripts that start processes: seconds each


@pytest.mark.slow
def test_ablation_resumes_from_its_results(bench, tmp_path):
    argv = ["--only", "base", "swiglu", "relu2", "--seeds", 1, "--iters", 1, "--eval_stories", 1]
    argv += ["--out", tmp_path / "results.jsonl"]
    results = bench("ablation", *argv)[1]["results"]["iters"]
    assert [row["variant"] for row in results] == ["base", "swiglu", "relu2"]
    assert results[0]["bpb"] == results[1]["bpb"] != results[2]["bpb"]  # swiglu is the recipe's: one run
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 2
    start = time.perf_counter()
    assert bench("ablation", *argv)[1]["results"]["iters"] == results and time.perf_counter() - start < 2


@pytest.mark.slow
def test_time_to_quality_selects_the_shortest_run_that_reaches_the_target(bench):
    argv = "--target 99 --repeats 1 --ours_iters 2 1 --eval_tokens 64 -- --batch_size=1".split()
    out, result = bench("time_to_quality", *argv)
    assert result["runs"][0]["ours"]["iters"] == 1 and "reached in 1 of 1 runs" in out


@pytest.mark.slow
def test_memory_and_start(bench):
    assert bench("memory", "--steps", 1, "--repeats", 1, "--batch_size", 1)[1]["peak_mb"]["ours"] > 50
    out, result = bench("start", "--repeats", 1, "--imports", 2)
    assert result["seconds"]["ours"] > result["ours_at"]["run set up"] and "torch" in out


@pytest.mark.slow
def test_prepare_speed(bench):
    argv = "--mb 0.05 --sizes 0.05 --tokenizers bpe300 --repeats 1 --workers 1".split()
    result = bench("prepare_speed", *argv, data=False)[1]
    assert result["peak_mb"]["0.05 MB, bpe300"] > 10 and len(result["mb_per_s"]) == 3


@pytest.mark.slow
def test_generation(bench):
    argv = "--n_layer 1 --n_embd 48 --block_size 32 --tokens 8 --window_tokens 1 --repeats 1".split()
    out, result = bench("generation", *argv, "--streams", 1, "--dtype", "float32", "float7", data=False)
    rates = {row["program"]: row["tokens_per_s"] for row in result["rates"]}
    assert rates["sample.py float32, 1 stream"] > 0 and rates["sample.py float7, 1 stream"] is None


@pytest.mark.slow
def test_curve_without_nanogpt(bench, tmp_path):
    argv = ["--iters", 4, "--points", 2, "--eval_tokens", 64, "--out", tmp_path / "curve.png"]
    curves = bench("curve", *argv)[1]["curves"]
    ((_, curve),) = curves.items()
    assert len(curve) == 3 and curve[0][0] < curve[-1][0], "at the start, in the middle, at the end"
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
