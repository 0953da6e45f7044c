"""
An ablation of config/tiny.py: one setting changed at a time, several seeds, equal tokens and equal time.

    python bench/ablation.py --iters 600 --seconds 60              # all: hours; rerun to continue
    python bench/ablation.py --only base relu2 swiglu --seconds 60
    python bench/ablation.py --list

Each run is a process, `python train.py config/tiny.py` with the settings of the variant and a schedule of the
run's length. --iters counts updates of the recipe's batch size, so a variant with twice the rows makes half
as many. --seconds is converted to updates by the variant's speed, measured in a short run before it; startup,
compilation and evaluation do not count. The score is bits per byte of the validation stories (in the
variant's own context length). Results are appended to --out, and a run that is already there is not repeated
unless the recipe or the variant has changed. Do not change the code between two calls.
"""

import hashlib
import json
import math
import statistics
import tempfile
from pathlib import Path

import common

import train
from nanostlm.settings import read_recipe, settings_of

ADAMW = dict(optimizer="adamw", weight_decay=0.1)
VARIANTS: dict[str, dict] = {
    "base": {},
    "learned-positions": dict(position="learned"),
    "no-positions": dict(position="none"),
    "swiglu": dict(mlp="swiglu"),
    "geglu": dict(mlp="geglu"),
    "gelu": dict(mlp="gelu"),
    "relu2": dict(mlp="relu2"),
    "layernorm": dict(norm="layernorm"),
    "no-norm": dict(norm="none", embed_norm=False),
    "norm-weights": dict(norm_weight=True),
    "no-embedding-norm": dict(embed_norm=False),
    "no-qk-norm": dict(qk_norm=False),
    "tied": dict(tied=True, pair_tokens=0),
    "no-pointer": dict(pointer=False),
    "no-pointer-loss": dict(pointer_loss=0.0),
    "no-pair-start": dict(pair_tokens=0),
    "no-growth": dict(context_schedule=""),
    "init-gpt2": dict(init="gpt2"),
    "init-fan_in": dict(init="fan_in"),
    **{f"adamw-{lr:g}": ADAMW | dict(learning_rate=lr) for lr in (1e-3, 2e-3, 4e-3, 8e-3, 16e-3)},
    **{f"muon-{lr:g}": dict(muon_lr=lr) for lr in (0.005, 0.01, 0.04)},
    **{f"lr-{lr:g}": dict(learning_rate=lr) for lr in (0.005, 0.01, 0.04)},
    "cosine": dict(schedule="cosine"),
    "wsd": dict(schedule="wsd"),
    "linear": dict(schedule="linear"),
    "weight-decay-0.1": dict(weight_decay=0.1),
    **{f"batch-{rows}": dict(batch_size=rows) for rows in (3, 6, 12, 24)},
    **{f"context-{length}": dict(block_size=length) for length in (64, 128)},
    "plain-windows": dict(story_windows=False),
    "stories-together": dict(cross_stories=True),
    **{f"heads-{n}": dict(n_head=n) for n in (1, 2, 4, 8)},
    **{f"bpe{n}": dict(tokenizer=f"bpe{n}") for n in (512, 1024, 2048, 4096, 8192)},
    "2x192": dict(n_layer=2, n_embd=192),  # layers x width
    "3x160": dict(n_layer=3, n_embd=160),
    "6x96": dict(n_layer=6, n_embd=96),
    "8x96": dict(n_layer=8, n_embd=96),
    "softcap-15": dict(softcap=15.0),
}


class Bench:
    """The finished runs, in a file with one line per run."""

    def __init__(self, options):
        self.options, self.out = options, Path(options.out)
        self.out.parent.mkdir(parents=True, exist_ok=True)
        lines = self.out.read_text(encoding="utf-8").splitlines() if self.out.exists() else []
        self.done = {(row["mark"], row["seed"], row["budget"]): row for row in map(json.loads, lines)}
        default = {s.name: s.default for s in settings_of(train.TrainConfig).values()}
        self.recipe = default | read_recipe(options.recipe, train.TrainConfig)

    def result(self, name: str, seed: int, kind: str) -> dict:
        """The result of a variant after --iters or --seconds (`kind`), from the file if it is there."""
        settings, amount = dict(VARIANTS[name]), getattr(self.options, kind)
        data = common.load_data(self.options, settings.pop("tokenizer", ""))
        ends = (data.val == data.tokenizer.eot).nonzero()[0][: self.options.eval_stories]
        settings["eval_tokens"] = int(ends[-1]) + 1  # the same text for every vocabulary
        full = self.recipe | settings
        mark = json.dumps([full, data.tokenizer.sha256, len(data.train)])
        mark = hashlib.sha256(mark.encode()).hexdigest()[:12]
        key = mark, seed, f"{kind} {amount:g}"
        if key not in self.done:
            rate = step_tokens(self.recipe)
            if kind == "seconds":  # measured for every seed, because a machine's speed varies
                rate = self.train(settings, data, max_iters=30)["tokens_per_s"]
            tokens = amount * rate
            result = self.train(
                settings, data, max_iters=max(1, round(tokens / step_tokens(full))), seed=seed
            )
            result = {"variant": name, "mark": mark, "seed": seed, "budget": key[2], **result}
            self.done[key] = result
            with open(self.out, "a", encoding="utf-8") as file:
                file.write(json.dumps(result) + "\n")
            print(
                f"{name}, seed {seed}, {key[2]}: {result['bpb']:.4f} bits per byte, "
                f"{result['tokens']:,} tokens, {result['process_s']:.0f} s",
                flush=True,
            )
        return self.done[key] | {"variant": name}  # variants with the same settings share a run

    def train(self, settings: dict, data, **more) -> dict:
        """Run train.py up to its last evaluation -> the result of that, and the median speed."""
        with tempfile.TemporaryDirectory() as folder:
            settings = settings | dict(eval_interval=10**9, save_interval=10**9, fallback="") | more
            command = common.ours(self.options.recipe, data, folder, **settings)
            ran = common.run(command, until=rf"^step +{more['max_iters']:,}  val loss")
            lines = [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]
        rates = [line["tokens_per_s"] for line in lines if line["split"] == "train"]
        return {
            "bpb": lines[-1]["bpb"],
            "tokens": lines[-1]["tokens"],
            "steps": lines[-1]["step"],
            "process_s": round(ran.seconds, 2),
            "tokens_per_s": statistics.median(rates[1:] or rates),
        }


def step_tokens(settings: dict) -> int:
    return math.prod(settings[name] for name in ("batch_size", "gradient_accumulation_steps", "block_size"))


def summary(results: list[dict], names: list[str]) -> None:
    """Print one line per variant: mean, minimum and maximum over seeds, and mean difference from base."""
    base, rows = {r["seed"]: r["bpb"] for r in results if r["variant"] == "base"}, []
    for name in names:
        runs = [r for r in results if r["variant"] == name]
        bpb = [r["bpb"] for r in runs]
        differences = [r["bpb"] - base[r["seed"]] for r in runs if base]
        means = [statistics.mean(r[key] for r in runs) for key in ("tokens", "tokens_per_s")]
        rows.append(
            [
                name,
                len(runs),
                statistics.mean(bpb),
                min(bpb),
                max(bpb),
                statistics.mean(differences) if differences else None,
                *means,
            ]
        )
    rows.sort(key=lambda row: row[2])
    rows = [
        [*row[:2], *(f"{x:.4f}" for x in row[2:5]), None if row[5] is None else f"{row[5]:+.4f}", *row[6:]]
        for row in rows
    ]
    head = ["variant", "seeds", "bits per byte", "min", "max", "against base", "tokens", "tokens/s"]
    common.table(head, rows)


def main(argv: list[str] | None = None) -> None:
    parser = common.parser(__doc__, repeats=0)
    common.data_options(parser)
    add = parser.add_argument
    add("--iters", type=int, help="equal tokens: updates of the recipe's own size")
    add("--seconds", type=float, help="equal time: seconds of updates")
    add("--only", nargs="+", choices=list(VARIANTS), metavar="NAME", default=list(VARIANTS))
    add("--seeds", type=int, nargs="+", default=[1, 2, 3])
    add("--recipe", default=str(common.ROOT / "config" / "tiny.py"))
    add("--eval_stories", type=int, default=300, help="validation stories to score; default %(default)s")
    add("--out", default="out/ablation.jsonl", help="default %(default)s")
    add("--list", action="store_true", help="list the variants and their settings, and exit")
    options = common.parse(parser, argv)
    if options.list:
        rows = [[name, " ".join(common.words(settings))] for name, settings in VARIANTS.items()]
        return common.table(["variant", "settings"], rows)
    kinds = [kind for kind in ("iters", "seconds") if getattr(options, kind)]
    if not kinds:
        parser.error("give --iters, --seconds, or both")
    bench, results = Bench(options), {kind: [] for kind in kinds}
    for seed in options.seeds:  # the outer loop, so that every variant has a result after the first seed
        for name in options.only:
            for kind in kinds:
                results[kind].append(bench.result(name, seed, kind))
    for kind, rows_of_kind in results.items():
        print(f"\n{kind} {getattr(options, kind):g}")
        summary(rows_of_kind, options.only)
    common.finish("ablation", recipe=Path(options.recipe).name, results=results)


if __name__ == "__main__":
    main()
