"""The benchmarks: --help, shared functions, and runs without a peer, at sizes too small to mean anything."""

import argparse
import importlib
import json
import math
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT

import prepare
from nanostlm import tasks
from nanostlm.data import load_data

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
    assert "COMPUTED, NOT MEASURED" in out and result["measured"] is False
    names = {path.stem for path in (ROOT / "config").glob("*.py")} - {"finetune"}
    rows = {(row["recipe"], row["card"]) for row in result["recipes"]}
    assert rows == {(name, card) for name in names for card in result["cards"]} and len(result["cards"]) == 2
    slm = next(row for row in result["recipes"] if row["recipe"] == "slm" and "H100" in row["card"])
    assert 465e6 < slm["tokens_a_pass"] < 480e6
    flops = slm["tokens_a_step"] * slm["flops_a_token"] / 989e12
    moved = slm["bytes_a_step"] / 3.35e12
    assert (slm["limit_by_flops_s"], slm["limit_by_bytes_s"]) == pytest.approx((flops, moved))
    assert slm["limit_tokens_per_s"] == pytest.approx(slm["tokens_a_step"] / flops) and flops > moved
    assert slm["share"] == slm["mfu"] == pytest.approx(flops / (flops / 0.7 + moved / 0.8))


def test_floors_share_is_below_the_limit(bench, tmp_path):
    argv = ["--data_dir", tmp_path, "--products", 1, "--copies", 1, "--launch_us"]
    for launch_us in (0, 5, 500):
        for row in bench("floors", *argv, launch_us, data=False)[1]["recipes"]:
            assert 0 < row["mfu"] <= row["share"] < 1
            assert row["tokens_per_s"] == pytest.approx(row["share"] * row["limit_tokens_per_s"])
            step = row["tokens_a_step"] / row["tokens_per_s"]
            assert step >= row["kernels_a_step"] * launch_us / 1e6 * 0.999


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
# gpu.py, with its jobs replaced by short programs or functions

SUCCESS = """print('result: {"tokens_per_s": 1234.5, "note": "fine"}')"""
LEAVES_CHILD = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
print(child.pid, file=open({!r}, "w"), flush=True)
"""


@pytest.fixture
def gpu(monkeypatch, capsys):
    """gpu(programs, *argv) -> (exit status, stdout without its last line, the JSON of its last line)."""
    import gpu

    def run(programs: dict[str, str], *argv, limit: float = 60):
        monkeypatch.setattr(gpu, "jobs", lambda: dict.fromkeys(programs, (limit, None)))
        python = [sys.executable, "-S", "-c"]
        monkeypatch.setattr(gpu, "job_command", lambda name, options: [*python, programs[name]])
        status = gpu.main(["--dry-run", *argv])
        *lines, last = capsys.readouterr().out.strip().splitlines()
        return status, "\n".join(lines), json.loads(last, parse_constant=pytest.fail)

    return run


def test_gpu_prints_the_results_of_every_job(gpu):
    status, out, result = gpu({"first": SUCCESS, "second/a": SUCCESS})
    assert status == 0 and result["failed"] == [] and result["measured"] is False
    assert "NOTHING WAS MEASURED" in out and "0 of 2 failed" in out
    row = next(line for line in out.splitlines() if line.startswith("second/a "))
    assert row.split()[1] == "ok" and "1,23" in row and row.endswith("fine")
    assert result["jobs"]["first"] == result["jobs"]["first"] | {"tokens_per_s": 1234.5, "state": "ok"}


@pytest.mark.parametrize(
    "program, note",
    [
        ("raise SystemExit('no good')", "no good"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "status -11"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("print('nothing')", "nothing"),
        ("", "status 0"),
        ("print('WARNING: this run is not compiled');" + SUCCESS, "WARNING: this run is not compiled"),
        ("import time; time.sleep(60)", "stopped after 2 s"),
    ],
)
def test_gpu_continues_after_a_failed_job(gpu, program, note):
    start = time.monotonic()
    status, out, result = gpu({"before": SUCCESS, "bad": program, "after": SUCCESS}, limit=1)
    assert status == 1 and result["failed"] == ["bad"] and "1 of 3 failed: bad" in out
    assert result["jobs"]["bad"]["note"] == note and result["jobs"]["after"]["state"] == "ok"
    assert time.monotonic() - start < 30


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("end", [SUCCESS, "time.sleep(60)"])
def test_gpu_kills_processes_left_by_a_job(gpu, tmp_path, end):
    gpu({"leaves": LEAVES_CHILD.format(str(tmp_path / "pid")) + end}, limit=1)
    stat = Path("/proc", (tmp_path / "pid").read_text().strip(), "stat")
    assert not stat.exists() or stat.read_text().split()[2] == "Z", "it has ended, and may be a zombie"


def test_gpu_only_selects_parts(gpu, capsys):
    programs = dict.fromkeys(
        ["tests", "speed/tiny/plain", "speed/tiny/compiled", "speed/tiny2/plain"], SUCCESS
    )
    expected = {
        ("--only", "speed/tiny"): ["speed/tiny/plain", "speed/tiny/compiled"],
        ("--only", "speed/tiny/plain,tests"): ["tests", "speed/tiny/plain"],
        ("--only", "tests", "--only", "speed"): list(programs),
    }
    for argv, names in expected.items():
        assert list(gpu(programs, *argv)[2]["jobs"]) == names
    for unknown in ("speeds", "speed/tin", ""):
        with pytest.raises(SystemExit) as excinfo:
            gpu(programs, "--only", unknown)
        assert excinfo.value.code == 2 and "there is no part" in capsys.readouterr().err


def test_gpu_jobs_fail_after_the_time_limit(gpu):
    status, _, result = gpu(dict.fromkeys("abc", SUCCESS), "--minutes", "0")
    assert status == 1 and result["failed"] == list("abc")


def test_gpu_without_a_gpu_exits_with_a_hint(monkeypatch, capsys):
    import gpu

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as excinfo:
        gpu.main([])
    assert excinfo.value.code == 2 and "--dry-run" in capsys.readouterr().err


def test_gpu_times_every_recipe_with_and_without_compile():
    import gpu

    recipes = {path.stem for path in (ROOT / "config").glob("*.py")} - {"finetune"}
    names = {f"speed/{recipe}/{kind}" for recipe in recipes for kind in ("plain", "compiled")}
    assert {name for name in gpu.jobs() if name.startswith("speed/")} == names
    assert {name.split("/")[0] for name in gpu.jobs()} == set(
        "tests resume fp16 ranks generation quality speed".split()
    )


def test_gpu_speed_of_a_micro_model():
    import gpu

    result = gpu.speed(argparse.Namespace(dry_run=True), "tiny", compiled=False)
    assert result["tokens_per_s"] > 0 and result["peak_mb"] > 0 and "128 tokens a step" in result["note"]
    assert json.loads(json.dumps(result)) == result and "compile_s" not in result


@pytest.fixture
def fake_runs(monkeypatch, tmp_path):
    """gpu.py with programs that only print `output`, and the options of a part."""
    import gpu

    def run(options, command, *args, output="resuming out at step 20", **how):
        return common.Ran(1.0, [(0.5, output)], 9.0, 0)

    monkeypatch.setattr(gpu, "run", run)
    monkeypatch.setattr(gpu, "short_run", lambda options, name, *args, **settings: ([], tmp_path / name))
    monkeypatch.setattr(gpu, "run_state", lambda folder: {"scaler": {"scale": 65536.0}})
    return gpu, argparse.Namespace(dry_run=True)


@pytest.mark.parametrize(
    "losses, message",
    [
        ({"whole": 1.0, "killed": 1.0}, None),
        ({"whole": 1.0, "killed": 1.1, "again": 1.0}, "two uninterrupted runs are equal"),
        ({"whole": 1.0, "killed": 1.1, "again": 1.2}, "two uninterrupted runs also differ"),
    ],
)
def test_gpu_resume_compares_runs(fake_runs, monkeypatch, losses, message):
    gpu, options = fake_runs
    monkeypatch.setattr(gpu, "metrics", lambda folder: [{"loss": losses[folder.name]}])
    if message is None:
        assert "at step 20: bitwise equal" in gpu.resume(options, compiled=False)["note"]
    else:
        with pytest.raises(SystemExit, match=message):
            gpu.resume(options, compiled=False)


@pytest.mark.parametrize("losses, learns", [([3.0, 2.5, 2.0], True), ([3.0, 2.5, math.nan], False)])
def test_gpu_fp16_fails_without_learning(fake_runs, monkeypatch, losses, learns):
    gpu, options = fake_runs
    monkeypatch.setattr(gpu, "metrics", lambda folder, split: [{"loss": loss} for loss in losses])
    if learns:
        assert gpu.fp16(options)["note"] == "validation loss from 3.000 to 2.000, scale 65,536"
    else:
        with pytest.raises(SystemExit, match="from 3.000 to nan"):
            gpu.fp16(options)


@pytest.mark.parametrize("second_loss, agree", [(2.0001, True), (2.1, False), (math.nan, False)])
def test_gpu_ranks_fails_if_the_losses_differ(fake_runs, monkeypatch, second_loss, agree):
    gpu, options = fake_runs

    def read_metrics(folder):
        loss, speed = (2.0, 100) if folder.name == "ranks-1" else (second_loss, 180)
        return [{"split": "train", "loss": loss, "tokens_per_s": speed}] * 12

    monkeypatch.setattr(gpu.runs, "read_metrics", read_metrics)
    if agree:
        assert "1.80 times the speed" in gpu.ranks(options)["note"]
    else:
        with pytest.raises(SystemExit, match="differ by"):
            gpu.ranks(options)


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


def test_latents_repeats_no_run(bench, tmp_path):
    recipe = tmp_path / "small.py"
    recipe.write_text("architecture = 'thoughts'\nn_head = 1\nn_embd = 8\nlocal_embd = 8\nblock_size = 32\n")
    argv = f"--updates 2 --latents 1 --widths 2 4 --eval_tokens 64 --recipe {recipe}".split()
    argv += ["--out_dir", tmp_path / "runs", "--out", tmp_path / "latents.png"]
    first = bench("latents", *argv)[1]["bpb"]
    assert list(first) == ["none", "1 x 2", "1 x 4"] and first["1 x 2"] != first["1 x 4"]
    assert (tmp_path / "latents.png").read_bytes().startswith(b"\x89PNG")
    assert (
        json.loads((tmp_path / "runs/1x4/config.json").read_text())["settings"]["model"]["latent_width"] == 4
    )
    (tmp_path / "runs" / "none" / "latest.pt").unlink()
    assert bench("latents", *argv)[1]["bpb"] == first and not (tmp_path / "runs/none/latest.pt").exists()


def test_references_are_told_by_earlier_sentences_only():
    from references import references

    text = 'Tom met Mia. "Hi!" said Mia. Then she ran.\nQuickly, Tom hid. Then he saw Tom. Sue sat.'
    assert references(text) == {
        "names": (text[: text.index("Tom hid")], "Tom", "hid"),
        "pronouns": (text[: text.index("she ran")], "she", "ran"),
    }
    assert references("Then he saw Tom. Sue sat. Tom sat.") == {}
    assert references("Tom met Mia. Mom said he ran. Sue and Tom sat.") == {}, "a word of the sentence tells"


def test_references_counts_wrong_names(bench, tmp_path, monkeypatch):
    import references
    from test_objectives import random_model, saved

    prepare.prepare("toystories", "byte", stories=200, data_dir=tmp_path)
    run, data = (
        saved(tmp_path / "model.pt", random_model(0, block_size=512)),
        tmp_path / "toystories" / "byte",
    )
    found = bench("references", run, "--data", data, "--stories", 3, data=False)[1]["wrong"]
    assert list(found) == [f"{run}: wrong names", f"{run}: wrong pronouns"]

    def knows(model, pairs, progress):
        stories = tasks.validation_texts(load_data(data))
        texts = [bytes(before[1:] + after).decode() for before, after in pairs]
        return np.array([float(any(t in story for story in stories)) for t in texts]), None

    monkeypatch.setattr(references.score, "loglikelihoods", knows)
    right = bench("references", run, "--data", data, "--stories", 3, data=False)[1]["wrong"]
    assert [*right.values()] == [0, 0]
