"""
Compare architectures: train each for the same time, and print one table.

    python experiments/compare.py                                    # all: two hours; rerun to continue
    python experiments/compare.py --only patches,bytes --seconds 60
    python experiments/compare.py --only thoughts,thoughts+context=none --corpora toystories --seconds 600
    python experiments/compare.py --table                            # only print what is finished

On real stories each model has two seeds, the best two have a third; on toystories, where every story can be
checked, each has one. First, a trial measures the speed of each model, without startup and evaluation, and by
turns, so that a slow minute of the machine meets all alike; leave the machine alone meanwhile. From this
follows the number of updates of its runs. The files of a run are in OUT_DIR/NAME-CORPUS-SEED: one that was
interrupted is resumed, one with a result.json is done.
"""

import json
import random
import re
import statistics
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from string import ascii_lowercase

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # a script here imports from the repository
MODELS = {  # name: recipe
    "bpe4096": "config/tiny.py",
    "patches": "config/experiments/patches.py",
    "bytes": "config/experiments/bytes.py",
    "thoughts": "config/experiments/thoughts.py",
    "bigram": "config/experiments/bigram.py",
}
TRIAL = 101  # updates


def arguments(name: str, corpus: str, data_dir: str) -> list[str]:
    """The arguments of train.py for a model; +KEY=VALUE in its name is a setting."""
    model, *settings = name.split("+")
    words = [f"dataset={corpus}", f"data_dir={data_dir}", "fallback=", *settings]  # never another corpus
    return [str(ROOT / MODELS[model]), *(f"--{word}" for word in words)]


def plan(names: list[str], corpus: str, options) -> dict[str, dict]:
    """Speed and number of updates of each model, from OUT_DIR/plan.json or a trial."""
    file = Path(options.out_dir, "plan.json")
    known = json.loads(file.read_text()) if file.exists() else {"seconds": options.seconds, "models": {}}
    if known["seconds"] != options.seconds:
        raise ValueError(f"{file.parent} has runs of {known['seconds']:g} s: choose another --out_dir")
    if new := [name for name in names if name not in known["models"]]:
        from train import Trainer, build_model, configure

        trainers, seconds = {}, dict.fromkeys(new, 0.0)
        for name in new:
            run = configure([*arguments(name, corpus, options.data_dir), f"--max_iters={TRIAL}"])
            trainers[name] = Trainer(run.config, build_model(run), run.data, chosen=run.machine)
            trainers[name].train_step(0)  # slower than the others
        for first in range(1, TRIAL, 10):
            for name, trainer in trainers.items():
                began = time.perf_counter()
                for step in range(first, min(first + 10, TRIAL)):
                    trainer.train_step(step)
                trainer.read_outcome()
                seconds[name] += time.perf_counter() - began
        for name, trainer in trainers.items():
            per_s = (TRIAL - 1) / seconds[name]
            n = max(TRIAL, round(options.seconds * per_s))
            known["models"][name] = {"max_iters": n, "tokens_per_s": per_s * trainer.tokens_per_step}
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(known, indent=1))
    return known["models"]


def run(name: str, corpus: str, seed: int, plan: dict | None, options) -> dict | None:
    """The result of one model; without a plan, None if it is not finished."""
    folder = Path(options.out_dir, f"{name}-{corpus}-{seed}")
    result = folder / "result.json"
    if plan and not result.exists():
        words = [*arguments(name, corpus, options.data_dir), f"--out_dir={folder}", f"--seed={seed}"]
        words += [f"--{key}={plan['max_iters']}" for key in ("max_iters", "eval_interval")]
        words += ["--resume"] if (folder / "metrics.jsonl").exists() else []
        done = subprocess.run([sys.executable, ROOT / "train.py", *words], stdout=subprocess.PIPE, text=True)
        if done.returncode:
            raise RuntimeError(f"train.py for {name}: status {done.returncode}; run this again to resume")
        report = dict(re.findall(r"^(\w+): ([\d.]+)$", done.stdout, re.M))
        result.write_text(json.dumps(report | plan | measure(folder, corpus), indent=1))
    return json.loads(result.read_text()) if result.exists() else None


def misspell(text: str, rng: random.Random, share: float = 0.05) -> str:
    """Put a random letter in the place of this share of the letters."""
    return "".join(rng.choice(ascii_lowercase) if c.isalpha() and rng.random() < share else c for c in text)


def measure(folder: Path, corpus: str) -> dict:
    """
    FLOPs and speeds per byte; bits per byte of 100 stories, and with 5% of their letters wrong; and of
    toystories, the share of 100 that are valid, and the rules that the others break first.
    """
    from nanostlm import checkpoint, data, generate, sources, tasks

    model, tokenizer, state = checkpoint.build(checkpoint.find(folder))
    trained = state["train_config"]
    prepared = data.load_data(Path(*(trained[key] for key in ("data_dir", "dataset", "tokenizer"))))
    meta, real = prepared.meta, tasks.validation_texts(prepared)[:100]
    per_token = (meta["val"]["bytes"] + meta["val"]["stories"]) / meta["val"]["tokens"]  # bytes
    began = time.perf_counter()
    texts = [generate.stories(model, tokenizer, seed=i, max_new_tokens=400)[0] for i in range(5)]
    speed = sum(len(text.encode()) for text in texts) / (time.perf_counter() - began)
    found = {"bytes_per_token": per_token, "generated_bytes_per_s": speed, "samples": texts}
    found["flops_per_byte"] = model.config.estimate()["flops_per_token"] / per_token
    rng = random.Random(0)
    for name, scored in {"100": real, "misspelled": [misspell(text, rng) for text in real]}.items():
        result = tasks.bpb(tasks.Subject(name, model, tokenizer, texts=scored))
        found[f"bpb_{name}"] = result.figures[0].value
    if check := sources.corpus(corpus).check:
        stories = generate.stories(model, tokenizer, "", 100, temperature=1, top_p=1)
        verdicts = [check(text) for text in stories]
        found["valid"] = statistics.mean(verdict.ok for verdict in verdicts)
        found["broken"] = Counter(verdict.rule for verdict in verdicts if not verdict.ok)
    return found


def table(results: dict[str, dict[str, list[dict]]]) -> str:
    """Markdown, from {model: {corpus: results of its seeds}}."""
    head = ["model", "parameters", "MFLOP per byte", "bits per byte", "seeds", "5% of letters wrong"]
    head += ["training, kB/s", "writing, B/s", "valid toystories"]
    rows = [head, ["---"] * len(head)]
    for name, found in results.items():
        if real := found.get("tinystories") or found.get("toystories"):
            bpb = [float(x["val_bpb"]) for x in real]
            valid = [f"{x['valid']:.0%}" for x in found.get("toystories", ())]
            rows.append(
                [
                    name,
                    f"{int(real[0]['parameters']) / 1e6:.2f}M",
                    f"{real[0]['flops_per_byte'] / 1e6:.1f}",
                    f"{statistics.mean(bpb):.4f} (spread {max(bpb) - min(bpb):.4f})",
                    str(len(bpb)),
                    f"{real[0]['bpb_100']:.3f} -> {real[0]['bpb_misspelled']:.3f}",
                    f"{int(real[0]['tokens_per_s']) * real[0]['bytes_per_token'] / 1e3:.1f}",
                    f"{real[0]['generated_bytes_per_s']:,.0f}",
                    ", ".join(valid) or "-",
                ]
            )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main(argv: list[str]) -> None:
    from nanostlm import settings

    parser = settings.Parser(description="Train each architecture for the same time, and print one table.")
    parser.add_argument("--only", default=",".join(MODELS), help="names, perhaps with +KEY=VALUE, and commas")
    parser.add_argument("--corpora", default="tinystories,toystories", help="separated by a comma")
    parser.add_argument("--seconds", type=float, default=240, help="of training for each run")
    parser.add_argument("--data_dir", default="data", help="as in train.py")
    parser.add_argument("--out_dir", default="out/compare", help="where the runs are")
    parser.add_argument("--table", action="store_true", help="only print what is finished")
    options = parser.parse_args(argv)
    names, corpora = options.only.split(","), options.corpora.split(",")
    if unknown := {name.split("+")[0] for name in names} - set(MODELS):
        raise ValueError(f"there is no model {', '.join(unknown)}: there are {', '.join(MODELS)}")
    if unknown := set(corpora) - {"tinystories", "toystories"}:
        raise ValueError(f"cannot compare on {', '.join(unknown)}: choose tinystories, toystories or both")
    results: dict[str, dict[str, list[dict]]] = {name: {} for name in names}
    plans = {} if options.table else plan(names, corpora[0], options)

    def add(name: str, corpus: str, seed: int) -> None:
        if corpus not in corpora:
            return
        if found := run(name, corpus, seed, plans.get(name), options):
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
