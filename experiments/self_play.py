"""
Self-play (SPIN, arXiv 2401.01335): a model learns to prefer the real continuations of stories to its own.

    python experiments/self_play.py --out_dir out/spin --init_from out/tiny          # rerun to continue
    python experiments/self_play.py --out_dir out/invalid --init_from out/tiny --arm invalid

In each round, the model of the previous round continues the beginnings of training stories at temperature 1,
and objective=prefer (prefer.py) trains it on pairs of the real continuation, chosen, and its own, rejected.
Texts that do not end within the context are dropped: they would teach the model never to end. The arms:

    spin           every continuation of the model is rejected
    invalid        only those that break a rule of the corpus, which needs a checker (toystories)
    unlikelihood   the same, and only the first wrong token becomes less likely
    plain          for comparison: plain training on as many tokens as the pairs would have

OUT_DIR/round-N has generated.jsonl (one line per batch of texts), prefer.jsonl (the pairs), the files of a
run of train.py, and result.json. KEY=VALUE are settings of train.py for every round. By default a round is
one epoch over the pairs with AdamW, at a hundredth of the learning rate that the model of init_from had.
"""

import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a script here imports from the repository
from nanostlm.entry import script

import train
from nanostlm import checkpoint, generate, machine, runs, settings, sources, stats, tasks
from nanostlm.corruptions import sentences

ARMS = ("spin", "invalid", "unlikelihood", "plain")
ROWS = 64  # texts that are generated in one batch
MOST = 20  # generated texts per pair, before it gives up
BATCH = 8  # pairs per update
EVAL_TOKENS = 65_536


def beginnings(plan: train.Plan, seed: list[int]) -> Iterator[list[tuple[str, str]]]:
    """
    Batches of training stories in random order, each cut at the end of a random sentence: its beginning and
    the rest. Stories of one sentence, and those that do not fit into the context, are left out.
    """
    ids, tokenizer, rng = plan.data.train, plan.data.tokenizer, np.random.default_rng(seed)
    ends = np.flatnonzero(ids == tokenizer.eot)
    starts = np.append(0, ends[:-1] + 1)
    order = rng.permutation(np.flatnonzero(ends - starts < plan.config.model.block_size))
    for first in range(0, len(order), ROWS):
        texts = [tokenizer.decode(ids[starts[i] : ends[i]]) for i in order[first : first + ROWS]]
        stories = [parts for text in texts if len(parts := sentences(text)) > 1]
        cuts = [rng.integers(1, len(parts)) for parts in stories]
        yield [("".join(parts[:n]), "".join(parts[n:])) for parts, n in zip(stories, cuts, strict=True)]


def continue_batch(model, tokenizer, begun: list[tuple[str, str]], seed: int, arm: str, check) -> dict:
    """The pairs of a batch of beginnings, and how many continuations were dropped for which reason."""
    began, pairs, dropped, T = time.perf_counter(), [], Counter(), model.config.block_size
    prompts = [tokenizer.encode(prompt) for prompt, _ in begun]
    most = T - min(map(len, prompts), default=0)
    written = generate.generate(model, prompts, most, eot=tokenizer.eot, seed=seed)  # without samplers: T=1
    for (prompt, chosen), before, ids in zip(begun, prompts, written, strict=True):
        rejected, wrong, reason = tokenizer.decode(ids), None, None
        if len(before) + len(ids) >= T:  # the context also has end-of-text
            reason = "unfinished"
        elif tokenizer.encode(rejected) != ids:  # prefer.py would score other tokens than these
            reason = "not in the usual tokens"
        elif rejected == chosen:
            reason = "equal to the real one"
        elif arm != "spin":
            verdict = check(prompt + rejected)
            if verdict.ok:
                reason = "valid"
            elif (verdict.at or 0) >= len(prompt):  # else the line breaks are wrong
                wrong = verdict.at - len(prompt)
            elif arm == "unlikelihood":
                reason = "without a wrong character"
        dropped.update([reason] if reason else [])
        if not reason:
            pairs.append({"prompt": prompt, "chosen": chosen, "rejected": rejected, "wrong": wrong})
    return {"seconds": time.perf_counter() - began, "dropped": dropped, "pairs": pairs}


def make_pairs(folder: Path, previous: Path, plan: train.Plan, check, options, number: int) -> dict:
    """
    Write prefer.jsonl of a round. -> counts and seconds. What a killed process finished is kept: each batch
    is a line of generated.jsonl, and depends only on its number, the round, the seed and the model.
    """
    log, model, pairs, dropped = folder / "generated.jsonl", None, {}, Counter()
    log.touch()
    lines = log.read_bytes().split(b"\n")[:-1]  # without the rest of a line that a kill has torn
    os.truncate(log, sum(len(line) + 1 for line in lines))
    batches = [json.loads(line) for line in lines]
    bar = tqdm(total=options.pairs, desc=f"round {number}", unit="pair")
    with bar, open(log, "a", encoding="utf-8") as file:
        for n, begun in enumerate(beginnings(plan, [options.seed, number])):
            if len(pairs) >= options.pairs or n * ROWS >= MOST * options.pairs:
                break
            if n == len(batches):
                model = model or checkpoint.load(previous, plan.machine.device)[0]
                seed = int(np.random.SeedSequence([options.seed, number, n]).generate_state(1)[0])
                batches.append(continue_batch(model, plan.data.tokenizer, begun, seed, options.arm, check))
                file.write(json.dumps(batches[n]) + "\n")
                file.flush()
            before, found = len(pairs), batches[n]["pairs"]
            pairs |= {(pair["prompt"], pair["rejected"]): pair for pair in found}
            dropped += Counter(batches[n]["dropped"], repeated=len(found) + before - len(pairs))
            bar.update(len(pairs) - before)
    texts, seconds = len(pairs) + dropped.total(), sum(batch["seconds"] for batch in batches)
    note = f"round {number}: {len(pairs):,} pairs from {texts:,} texts in {seconds:.0f} s; dropped: "
    note += ", ".join(f"{n:,} {why}" for why, n in dropped.items()) or "none"
    if len(pairs) < options.pairs:
        raise ValueError(f"{note}; lower --pairs={options.pairs}")
    print(note, file=sys.stderr)
    lines = [json.dumps(pair) + "\n" for pair in pairs.values()]
    runs.replace_text(folder / "prefer.jsonl", "".join(lines[: options.pairs]))
    return {"texts": texts, "dropped": dropped, "writing_s": seconds}


def arguments(options, state: dict, previous: Path, folder: Path, number=0, counts=None) -> list[str]:
    """Those of train.py. `state` is the checkpoint of init_from, `counts` are those of the training data."""
    trained, T = state["train_config"], state["model_config"]["block_size"]
    rows = settings.convert("batch_size", int, options.settings.get("batch_size", BATCH))
    values = {
        **{key: trained[key] for key in ("dataset", "stories", "cross_stories") if key in trained},
        **{"architecture": state.get("architecture", "gpt"), "block_size": T, "data_dir": options.data_dir},
        **{"init_from": previous, "out_dir": folder, "seed": options.seed + number},
        **{"optimizer": "adamw", "learning_rate": trained["learning_rate"] / 100, "schedule": "linear"},
        **{"weight_decay": 0.0, "batch_size": rows, "max_iters": max(1, options.pairs // max(1, rows))},
        **{"eval_interval": 10**9, "eval_tokens": EVAL_TOKENS, "save_interval": 100},
    }
    if options.arm != "plain":
        kind = "unlikelihood" if options.arm == "unlikelihood" else "dpo"
        pairs = folder / "prefer.jsonl" if number else __file__
        values |= {"objective": "prefer", "pairs": pairs, "preference": kind}
    elif counts:  # two rows of a mean story for each pair
        tokens = 2 * options.pairs * counts["tokens"] / counts["stories"]
        values["max_iters"] = max(1, round(tokens / rows / T))
        values["story_windows"] = trained.get("story_windows", False)
    values = {"warmup_iters": min(10, values["max_iters"] // 2)} | values | options.settings
    resume = ["--resume"] if (folder / "metrics.jsonl").exists() else []
    return [f"--{key}={value}" for key, value in values.items()] + resume


def measure(path: Path, plan: train.Plan, check, judged: int) -> dict:
    """Bits per byte of the validation file, and how many of the model's stories are valid."""
    model, tokenizer = checkpoint.load(path, plan.machine.device)
    found, valid = {"bpb": tasks.validation_loss(model, plan.data, limit=EVAL_TOKENS)[1]}, 0
    for first in range(0, judged if check else 0, 100):
        n = min(100, judged - first)
        texts = generate.stories(model, tokenizer, "", n, seed=first, temperature=1, top_p=1)
        valid += sum(check(text).ok for text in texts)
    return found | ({"valid": valid, "judged": judged} if check else {})


def table(results: list[dict]) -> str:
    """Markdown, from the results of the rounds."""
    rows = [["round", "bits per byte", "valid stories", "writing, s", "training, s"], ["---"] * 5]
    for number, x in enumerate(results):
        valid = stats.proportion("valid", x.get("valid", 0), x.get("judged", 0))
        shown = f"{valid.value:.1%} ({stats.interval(valid)}; {valid.n:,})" if valid.n else "-"
        seconds = (f"{x[key]:.0f}" if key in x else "-" for key in ("writing_s", "training_s"))
        rows.append([str(number), f"{x['bpb']:.4f}", shown, *seconds])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def parse(argv: list[str]):
    parser = settings.Parser(description="Train a model to prefer real continuations of stories to its own.")
    add = parser.add_argument
    add("--out_dir", required=True, help="where the rounds are; the same command continues them")
    add("--init_from", required=True, help="the model to start from: a run or a checkpoint")
    add("--rounds", type=int, default=3, help="each with texts of the model of the one before (%(default)s)")
    add("--arm", choices=ARMS, default="spin", help="which texts are rejected, and how (%(default)s)")
    add("--pairs", type=int, default=2000, help="of continuations, in each round (%(default)s)")
    add("--data_dir", help="as in train.py (where the data of init_from were)")
    add("--judged", type=int, default=200, help="stories whose validity is checked per round (%(default)s)")
    add("--seed", type=int, default=0, help="of beginnings, texts and training (%(default)s)")
    add("settings", nargs="*", metavar="KEY=VALUE", help="settings of train.py for every round")
    options = parser.parse_args(argv)
    for name, least in {"rounds": 0, "pairs": 1, "judged": 0, "seed": 0}.items():
        if not least <= getattr(options, name) <= 10**9:
            parser.error(f"--{name} must be between {least} and 10**9, not {getattr(options, name)}")
    if wrong := [word for word in options.settings if "=" not in word]:
        parser.error(f"a setting of train.py is written KEY=VALUE, not {wrong[0]!r:.60}")
    options.settings = dict(word.split("=", 1) for word in options.settings)
    return options


@script
def main(argv: list[str]) -> int:
    options = parse(argv)
    out, path = Path(options.out_dir), checkpoint.find(options.init_from)
    state, folders = checkpoint.read(path), [out / f"round-{n}" for n in range(options.rounds + 1)]
    if "learning_rate" not in (trained := state.get("train_config", {})):
        raise ValueError(f"{path} was not trained with train.py")
    if machine.world_size() > 1:
        raise ValueError("self-play is for one process: start it without torchrun")
    check = sources.corpus(trained["dataset"]).check
    options.data_dir = options.data_dir or trained["data_dir"]
    if options.arm in ("invalid", "unlikelihood") and not check:
        raise ValueError(f"--arm {options.arm} needs a corpus with a checker: toystories")
    plan = train.configure(arguments(options, state, path, folders[0]))  # refuses wrong settings before work
    known = out / "options.json"
    mine = {key: value for key, value in vars(options).items() if key not in ("out_dir", "rounds")}
    before = json.loads(known.read_text()) if known.exists() else mine
    if changed := [f"{key}={before.get(key)}" for key in mine if mine[key] != before.get(key)]:
        raise ValueError(f"{out} has rounds with {', '.join(changed)}: choose another --out_dir")
    folders[0].mkdir(parents=True, exist_ok=True)
    runs.replace_text(known, json.dumps(mine, indent=1))
    results = []
    for number, folder in enumerate(folders):  # round 0 is the model of init_from
        previous, path = path, folder / "latest.pt" if number else path
        result, found = folder / "result.json", {}
        if number and not result.exists():
            folder.mkdir(exist_ok=True)
            if options.arm != "plain":
                found = make_pairs(folder, previous, plan, check, options, number)
            words = arguments(options, state, previous, folder, number, plan.data.meta["train"])
            if stop := train.run(train.configure(words), words).stop:
                print("the work is saved: the same command continues", file=sys.stderr)
                return 128 + stop
            found["training_s"] = runs.read_metrics(folder)[-1]["elapsed_s"]
        if not result.exists():
            runs.replace_text(
                result, json.dumps(found | measure(path, plan, check, options.judged), indent=1)
            )
        results.append(json.loads(result.read_text()))
    print(table(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
