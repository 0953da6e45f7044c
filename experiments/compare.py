"""
Compare architectures: train each for the same time, and print one table.

    python experiments/compare.py                                    # all: two hours; rerun to continue
    python experiments/compare.py --only patches,bytes --seconds 60
    python experiments/compare.py --table                            # only print what is finished

On real stories each model has two seeds, the best two have a third; on toystories, where every story can be
checked, each has one. A run's number of updates follows from its speed in a trial of 40 updates; startup and
evaluation do not count. Its files are in OUT_DIR/NAME-CORPUS-SEED: a run that was interrupted is resumed, and
one that has a result.json is not repeated. Leave the machine alone meanwhile.
"""

import json
import re
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # a script here imports from the repository
MODELS = {  # name: recipe
    "bpe4096": "config/tiny.py",
    "patches": "config/experiments/patches.py",
    "bytes": "config/experiments/bytes.py",
    "thoughts": "config/experiments/thoughts.py",
    "bigram": "config/experiments/bigram.py",
}
TRIAL = 40  # updates


def train(recipe: str, folder: Path, *words: str) -> str:
    """Run train.py, or resume what is in `folder`. Returns its stdout."""
    more = ["--resume"] if (folder / "metrics.jsonl").exists() else []
    command = [sys.executable, ROOT / "train.py", ROOT / recipe, f"--out_dir={folder}", *words, *more]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise RuntimeError(f"train.py {recipe} ended with status {done.returncode}; run this again to resume")
    return done.stdout


def updates(recipe: str, seconds: float, folder: Path, *words: str) -> int:
    """How many updates take that many seconds, by a trial."""
    shutil.rmtree(folder, ignore_errors=True)
    words = [*words, f"--max_iters={TRIAL}", "--log_interval=5", "--eval_tokens=1000", "--sample_interval=0"]
    train(recipe, folder, *words, f"--eval_interval={TRIAL}", f"--save_interval={TRIAL}")
    from nanostlm import runs

    lines = [line for line in runs.read_metrics(folder) if line["split"] == "train"][1:]
    speed = statistics.harmonic_mean(line["tokens_per_s"] for line in lines)
    shutil.rmtree(folder)
    return max(TRIAL, round(seconds * speed * TRIAL / lines[-1]["tokens"]))


def run(name: str, corpus: str, seed: int, seconds: float, out_dir: Path, words: list[str]) -> dict:
    """Train and measure one model, unless that has been done."""
    folder = out_dir / f"{name}-{corpus}-{seed}"
    result, plan = folder / "result.json", out_dir / f"{name}-{corpus}-{seed}.json"
    if result.exists():
        return json.loads(result.read_text())
    words = [*words, f"--dataset={corpus}", f"--seed={seed}", "--fallback="]
    if not plan.exists():
        n = updates(MODELS[name], seconds, out_dir / "trial", *words)
        plan.parent.mkdir(parents=True, exist_ok=True)
        plan.write_text(json.dumps({"max_iters": n, "seconds": seconds}))
    n = json.loads(plan.read_text())["max_iters"]
    report = train(MODELS[name], folder, *words, f"--max_iters={n}", f"--eval_interval={n}")
    found = dict(re.findall(r"^(\w+): ([\d.]+)$", report, re.M)) | measure(folder, corpus)
    result.write_text(json.dumps(found, indent=1))
    return found


def measure(folder: Path, corpus: str) -> dict:
    """FLOPs and speeds per byte; on toystories, the share of 100 stories that are valid."""
    from nanostlm import checkpoint, data, generate, sources

    model, tokenizer, state = checkpoint.build(checkpoint.find(folder))
    trained = state["train_config"]
    meta = data.load_data(Path(*(trained[key] for key in ("data_dir", "dataset", "tokenizer")))).meta
    per_token = (meta["val"]["bytes"] + meta["val"]["stories"]) / meta["val"]["tokens"]  # bytes
    began = time.perf_counter()
    texts = [generate.stories(model, tokenizer, seed=i, max_new_tokens=400)[0] for i in range(5)]
    speed = sum(len(text.encode()) for text in texts) / (time.perf_counter() - began)
    found = {"bytes_per_token": per_token, "generated_bytes_per_s": speed, "samples": texts}
    found["flops_per_byte"] = model.config.estimate()["flops_per_token"] / per_token
    if check := sources.corpus(corpus).check:
        stories = generate.stories(model, tokenizer, "", 100, temperature=1, top_p=1)
        found["valid"] = statistics.mean(check(text).ok for text in stories)
    return found


def table(results: dict[str, dict[str, list[dict]]]) -> str:
    """Markdown, from {model: {corpus: results of its seeds}}."""
    head = ["model", "parameters", "MFLOP per byte", "bits per byte", "seeds", "training, kB/s"]
    head += ["writing, B/s", "valid toystories"]
    rows = [head, ["---"] * len(head)]
    for name, found in results.items():
        if real := found.get("tinystories"):
            bpb = [float(x["val_bpb"]) for x in real]
            valid = [f"{x['valid']:.0%}" for x in found.get("toystories", ())]
            rows.append(
                [
                    name,
                    f"{int(real[0]['parameters']) / 1e6:.2f}M",
                    f"{real[0]['flops_per_byte'] / 1e6:.1f}",
                    f"{statistics.mean(bpb):.4f} (spread {max(bpb) - min(bpb):.4f})",
                    str(len(bpb)),
                    f"{int(real[0]['tokens_per_s']) * real[0]['bytes_per_token'] / 1e3:.1f}",
                    f"{real[0]['generated_bytes_per_s']:,.0f}",
                    ", ".join(valid) or "-",
                ]
            )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main(argv: list[str]) -> None:
    from nanostlm import settings

    parser = settings.Parser(description="Train each architecture for the same time, and print one table.")
    parser.add_argument("--only", default=",".join(MODELS), help="names, separated by commas")
    parser.add_argument("--seconds", type=float, default=240, help="of training for each run")
    parser.add_argument("--data_dir", default="data", help="as in train.py")
    parser.add_argument("--out_dir", default="out/compare", help="where the runs are")
    parser.add_argument("--table", action="store_true", help="only print what is finished")
    options = parser.parse_args(argv)
    names, out_dir, words = options.only.split(","), Path(options.out_dir), [f"--data_dir={options.data_dir}"]
    if unknown := set(names) - set(MODELS):
        raise ValueError(f"there is no model {', '.join(unknown)}: there are {', '.join(MODELS)}")
    results: dict[str, dict[str, list[dict]]] = {name: {} for name in names}

    def add(name: str, corpus: str, seed: int) -> None:
        if not options.table or (out_dir / f"{name}-{corpus}-{seed}" / "result.json").exists():
            found = run(name, corpus, seed, options.seconds, out_dir, words)
            results[name].setdefault(corpus, []).append(found)
            print(f"{name}, {corpus}, seed {seed}: {found['val_bpb']} bits per byte", file=sys.stderr)

    for seed in (1, 2):
        for name in names:
            add(name, "tinystories", seed)
    for name in names:
        add(name, "toystories", 1)
    real = {name: found["tinystories"] for name, found in results.items() if "tinystories" in found}
    mean = {name: statistics.mean(float(x["val_bpb"]) for x in found) for name, found in real.items()}
    for name in sorted(mean, key=mean.get)[:2]:
        add(name, "tinystories", 3)
    print(table(results))


if __name__ == "__main__":
    from nanostlm.entry import script

    sys.exit(script(main)(sys.argv[1:]))
