"""The benchmarks: each explains itself; without a peer they run at a size where nothing is measured."""

import argparse
import importlib
import json
import math
import sys
import time
from pathlib import Path

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
    assert "COMPUTED, NOT MEASURED" in said and made["measured"] is False
    names = {path.stem for path in (ROOT / "config").glob("*.py")} - {"finetune"}
    both = {(one["recipe"], one["card"]) for one in made["recipes"]}
    assert both == {(name, card) for name in names for card in made["cards"]} and len(made["cards"]) == 2
    slm = next(one for one in made["recipes"] if one["recipe"] == "slm" and "H100" in one["card"])
    assert 465e6 < slm["tokens_a_pass"] < 480e6
    flops = slm["tokens_a_step"] * slm["flops_a_token"] / 989e12
    moved = slm["bytes_a_step"] / 3.35e12
    assert (slm["limit_by_flops_s"], slm["limit_by_bytes_s"]) == pytest.approx((flops, moved))
    assert slm["limit_tokens_per_s"] == pytest.approx(slm["tokens_a_step"] / flops) and flops > moved
    assert slm["share"] == slm["mfu"] == pytest.approx(flops / (flops / 0.7 + moved / 0.8))


def test_floors_are_shares_of_a_limit_that_no_assumption_passes(bench, tmp_path):
    words = ["--data_dir", tmp_path, "--products", 1, "--copies", 1, "--launch_us"]
    for launch_us in (0, 5, 500):
        for one in bench("floors", *words, launch_us, data=False)[1]["recipes"]:
            assert 0 < one["mfu"] <= one["share"] < 1
            assert one["tokens_per_s"] == pytest.approx(one["share"] * one["limit_tokens_per_s"])
            step = one["tokens_a_step"] / one["tokens_per_s"]
            assert step >= one["kernels_a_step"] * launch_us / 1e6 * 0.999


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
# gpu.py, with Python programs or functions in place of its jobs

FINE = """print('result: {"tokens_per_s": 1234.5, "note": "fine"}')"""
LEAVES = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
print(child.pid, file=open({!r}, "w"), flush=True)
"""


@pytest.fixture
def gpu(monkeypatch, capsys):
    """gpu(programs, words...) -> status, what it printed before its last line, and that line's JSON."""
    import gpu

    def go(programs: dict[str, str], *words, limit: float = 60):
        monkeypatch.setattr(gpu, "jobs", lambda: dict.fromkeys(programs, (limit, None)))
        start = [sys.executable, "-S", "-c"]
        monkeypatch.setattr(gpu, "job_command", lambda name, options: [*start, programs[name]])
        status = gpu.main(["--dry-run", *words])
        *said, last = capsys.readouterr().out.strip().splitlines()
        return status, "\n".join(said), json.loads(last, parse_constant=pytest.fail)

    return go


def test_gpu_shows_what_every_job_found(gpu):
    status, said, made = gpu({"first": FINE, "second/a": FINE})
    assert status == 0 and made["failed"] == [] and made["measured"] is False
    assert "NOTHING WAS MEASURED" in said and "0 of 2 failed" in said
    row = next(line for line in said.splitlines() if line.startswith("second/a "))
    assert row.split()[1] == "ok" and "1,23" in row and row.endswith("fine")
    assert made["jobs"]["first"] == made["jobs"]["first"] | {"tokens_per_s": 1234.5, "state": "ok"}


@pytest.mark.parametrize(
    "program, note",
    [
        ("raise SystemExit('no good')", "no good"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "status -11"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("print('nothing')", "nothing"),
        ("", "status 0"),
        ("print('WARNING: this run is not compiled');" + FINE, "WARNING: this run is not compiled"),
        ("import time; time.sleep(60)", "stopped after 2 s"),
    ],
)
def test_gpu_goes_on_after_a_job_that_fails(gpu, program, note):
    began = time.monotonic()
    status, said, made = gpu({"before": FINE, "bad": program, "after": FINE}, limit=1)
    assert status == 1 and made["failed"] == ["bad"] and "1 of 3 failed: bad" in said
    assert made["jobs"]["bad"]["note"] == note and made["jobs"]["after"]["state"] == "ok"
    assert time.monotonic() - began < 30


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("end", [FINE, "time.sleep(60)"])
def test_gpu_ends_what_a_job_leaves(gpu, tmp_path, end):
    gpu({"leaves": LEAVES.format(str(tmp_path / "pid")) + end}, limit=1)
    stat = Path("/proc", (tmp_path / "pid").read_text().strip(), "stat")
    assert not stat.exists() or stat.read_text().split()[2] == "Z", "ended, if perhaps not collected"


def test_gpu_runs_the_parts_that_are_wanted(gpu, capsys):
    programs = dict.fromkeys(["tests", "speed/tiny/plain", "speed/tiny/compiled", "speed/tiny2/plain"], FINE)
    chosen = {
        ("--only", "speed/tiny"): ["speed/tiny/plain", "speed/tiny/compiled"],
        ("--only", "speed/tiny/plain,tests"): ["tests", "speed/tiny/plain"],
        ("--only", "tests", "--only", "speed"): list(programs),
    }
    for words, names in chosen.items():
        assert list(gpu(programs, *words)[2]["jobs"]) == names
    for wrong in ("speeds", "speed/tin", ""):
        with pytest.raises(SystemExit) as end:
            gpu(programs, "--only", wrong)
        assert end.value.code == 2 and "there is no part" in capsys.readouterr().err


def test_gpu_stops_when_its_minutes_are_over(gpu):
    status, _, made = gpu(dict.fromkeys("abc", FINE), "--minutes", "0")
    assert status == 1 and made["failed"] == list("abc")


def test_gpu_needs_a_gpu(monkeypatch, capsys):
    import gpu

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as end:
        gpu.main([])
    assert end.value.code == 2 and "--dry-run" in capsys.readouterr().err


def test_gpu_has_every_recipe_with_and_without_compiling():
    import gpu

    recipes = {path.stem for path in (ROOT / "config").glob("*.py")} - {"finetune"}
    names = {f"speed/{recipe}/{kind}" for recipe in recipes for kind in ("plain", "compiled")}
    assert {name for name in gpu.jobs() if name.startswith("speed/")} == names
    assert {name.split("/")[0] for name in gpu.jobs()} == set(
        "tests resume fp16 ranks generation quality speed".split()
    )


def test_gpu_measures_the_speed_of_a_micro_model():
    import gpu

    made = gpu.speed(argparse.Namespace(dry_run=True), "tiny", compiled=False)
    assert made["tokens_per_s"] > 0 and made["peak_mb"] > 0 and "128 tokens a step" in made["note"]
    assert json.loads(json.dumps(made)) == made and "compile_s" not in made


@pytest.fixture
def fake_runs(monkeypatch, tmp_path):
    """gpu.py whose programs do nothing but say `said`, and the options of a part."""
    import gpu

    def run(options, command, *args, said="resuming out at step 20", **how):
        return common.Ran(1.0, [(0.5, said)], 9.0, 0)

    monkeypatch.setattr(gpu, "run", run)
    monkeypatch.setattr(gpu, "short_run", lambda options, name, *args, **settings: ([], tmp_path / name))
    monkeypatch.setattr(gpu, "kept", lambda folder: {"scaler": {"scale": 65536.0}})
    return gpu, argparse.Namespace(dry_run=True)


@pytest.mark.parametrize(
    "losses, why",
    [
        ({"whole": 1.0, "killed": 1.0}, None),
        ({"whole": 1.0, "killed": 1.1, "again": 1.0}, "two undisturbed runs are equal"),
        ({"whole": 1.0, "killed": 1.1, "again": 1.2}, "two undisturbed runs differ, too"),
    ],
)
def test_gpu_resume_compares_runs(fake_runs, monkeypatch, losses, why):
    gpu, options = fake_runs
    monkeypatch.setattr(gpu, "lines", lambda folder: [{"loss": losses[folder.name]}])
    if why is None:
        assert "at step 20: equal" in gpu.resume(options, compiled=False)["note"]
    else:
        with pytest.raises(SystemExit, match=why):
            gpu.resume(options, compiled=False)


@pytest.mark.parametrize("losses, good", [([3.0, 2.5, 2.0], True), ([3.0, 2.5, math.nan], False)])
def test_gpu_fp16_must_learn(fake_runs, monkeypatch, losses, good):
    gpu, options = fake_runs
    monkeypatch.setattr(gpu, "lines", lambda folder, split: [{"loss": loss} for loss in losses])
    if good:
        assert gpu.fp16(options)["note"] == "validation loss from 3.000 to 2.000, scale 65,536"
    else:
        with pytest.raises(SystemExit, match="from 3.000 to nan"):
            gpu.fp16(options)


@pytest.mark.parametrize("second, good", [(2.0001, True), (2.1, False), (math.nan, False)])
def test_gpu_ranks_must_agree(fake_runs, monkeypatch, second, good):
    gpu, options = fake_runs

    def read_metrics(folder):
        loss, speed = (2.0, 100) if folder.name == "ranks-1" else (second, 180)
        return [{"split": "train", "loss": loss, "tokens_per_s": speed}] * 12

    monkeypatch.setattr(gpu.runs, "read_metrics", read_metrics)
    if good:
        assert "1.80 times the speed" in gpu.ranks(options)["note"]
    else:
        with pytest.raises(SystemExit, match="apart"):
            gpu.ranks(options)


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
