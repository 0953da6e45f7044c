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

import experiments
import train
from nanostlm import checkpoint, generate, machine, runs, settings, sources, stats, tasks
from nanostlm.corruptions import sentences
from nanostlm.data import load_data

ARMS = ("spin", "invalid", "unlikelihood", "plain")
ROWS = 64  # texts that are generated in one batch
MOST = 20  # generated texts per pair, before it gives up
BATCH = 8  # pairs per update
EVAL_TOKENS = 65_536
MAY_CHANGE = ("out_dir", "rounds", "device")  # options, when a command continues


def write(file: Path, text: str) -> None:
    """Write a file at once or not at all."""
    temporary = file.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, file)


def beginnings(data, block_size: int, seed: list[int]) -> Iterator[list[tuple[str, str]]]:
    """
    Batches of training stories in random order, each cut at the end of a random sentence: its beginning and
    the rest. Stories of one sentence, and those that do not fit into block_size, are left out.
    """
    ends = np.flatnonzero(data.train == data.tokenizer.eot)
    starts, rng = np.append(0, ends[:-1] + 1), np.random.default_rng(seed)
    order = rng.permutation(np.flatnonzero(ends - starts < block_size))
    for first in range(0, len(order), ROWS):
        texts = [data.tokenizer.decode(data.train[starts[i] : ends[i]]) for i in order[first : first + ROWS]]
        parts = [found for text in texts if len(found := sentences(text)) > 1]
        cuts = [int(rng.integers(1, len(found))) for found in parts]
        yield [("".join(found[:n]), "".join(found[n:])) for found, n in zip(parts, cuts, strict=True)]


def continue_batch(model, tokenizer, begun: list[tuple[str, str]], seed: int, arm: str, check) -> dict:
    """The pairs of a batch of beginnings, and how many continuations were dropped for which reason."""
    began, pairs, dropped, T = time.perf_counter(), [], Counter(), model.config.block_size
    prompts = [tokenizer.encode(prompt) for prompt, _ in begun]
    most = T - min(map(len, prompts), default=0)
    written = generate.generate(model, prompts, most, eot=tokenizer.eot, seed=seed)  # without samplers: T=1
    for (prompt, chosen), before, ids in zip(begun, prompts, written, strict=True):
        rejected, wrong, reason = tokenizer.decode(ids), None, ""
        if len(before) + len(ids) >= T:  # the context also has end-of-text
            reason = "unfinished"
        elif tokenizer.encode(rejected) != ids:  # prefer.py would score other tokens than these
            reason = "not in the usual tokens"
        elif rejected == chosen:
            reason = "equal to the real one"
        elif arm != "spin":
            verdict = check(prompt + rejected)
            wrong = None if verdict.at is None else verdict.at - len(prompt)
            reason = "valid" if verdict.ok else ""
            if arm == "unlikelihood" and wrong is None and not reason:
                reason = "wrong in line breaks only"
        if reason:
            dropped[reason] += 1
        else:
            pairs.append({"prompt": prompt, "chosen": chosen, "rejected": rejected, "wrong": wrong})
    return {"seconds": time.perf_counter() - began, "dropped": dropped, "pairs": pairs}


def make_pairs(folder: Path, previous: Path, data, check, options, number: int) -> dict:
    """
    Write prefer.jsonl of a round. -> counts and seconds. What a killed process finished is kept: each batch
    is a line of generated.jsonl, and depends only on its number, the round, the seed and the model.
    """
    log, model, pairs, dropped = folder / "generated.jsonl", None, {}, Counter()
    log.touch()
    lines = log.read_bytes().split(b"\n")[:-1]  # without the rest of a line that a kill has torn
    os.truncate(log, sum(len(line) + 1 for line in lines))
    batches = [json.loads(line) for line in lines]
    block_size = checkpoint.read(previous)["model_config"]["block_size"]
    every = 0.1 if sys.stderr.isatty() else 30  # seconds between two lines of progress
    bar = tqdm(total=options.pairs, desc=f"round {number}", unit="pair", mininterval=every)
    with bar, open(log, "a", encoding="utf-8") as file:
        for n, begun in enumerate(beginnings(data, block_size, [options.seed, number])):
            if len(pairs) >= options.pairs or n * ROWS >= MOST * options.pairs:
                break
            if n == len(batches):
                model = model or checkpoint.load(previous, machine.choose_device(options.device))[0]
                seed = int(np.random.SeedSequence([options.seed, number, n]).generate_state(1)[0])
                batches.append(continue_batch(model, data.tokenizer, begun, seed, options.arm, check))
                file.write(json.dumps(batches[n]) + "\n")
                file.flush()
            before, found = len(pairs), {(x["prompt"], x["rejected"]): x for x in batches[n]["pairs"]}
            pairs |= found
            dropped += Counter(batches[n]["dropped"], repeated=len(batches[n]["pairs"]) + before - len(pairs))
            bar.update(len(pairs) - before)
    texts, reasons = len(pairs) + dropped.total(), ", ".join(f"{n:,} {why}" for why, n in dropped.items())
    if len(pairs) < options.pairs:
        found = f"{texts:,} texts of {previous} make {len(pairs):,} pairs only (dropped: {reasons or 'none'})"
        raise ValueError(f"{found}: lower --pairs")
    chosen = list(pairs.values())[: options.pairs]
    write(folder / "prefer.jsonl", "".join(json.dumps(pair) + "\n" for pair in chosen))
    seconds = sum(batch["seconds"] for batch in batches)
    note = f"round {number}: {texts:,} texts in {seconds:.0f} s; dropped: {reasons or 'none'}"
    print(note, file=sys.stderr)
    return {"texts": texts, "dropped": dropped, "writing_s": seconds}


def settings_of_round(options, state: dict, meta: dict, previous: Path, folder: Path, number: int) -> dict:
    """What train.py is given. `state` is the checkpoint of init_from, `meta` that of the data."""
    trained, T = state["train_config"], state["model_config"]["block_size"]
    rows = settings.convert("batch_size", int, options.settings.get("batch_size", BATCH))
    values = {
        **{key: trained[key] for key in ("dataset", "stories", "cross_stories") if key in trained},
        **{"architecture": state.get("architecture", "gpt"), "block_size": T, "data_dir": options.data_dir},
        **{"init_from": previous, "out_dir": folder, "seed": options.seed + number, "device": options.device},
        **{"optimizer": "adamw", "learning_rate": trained["learning_rate"] / 100, "schedule": "linear"},
        **{"weight_decay": 0.0, "batch_size": rows, "max_iters": max(1, options.pairs // rows)},
        **{"eval_interval": 10**9, "eval_tokens": EVAL_TOKENS, "save_interval": 100},
    }
    if options.arm == "plain":  # two rows of a mean story for each pair
        tokens = 2 * options.pairs * meta["train"]["tokens"] / meta["train"]["stories"]
        values["max_iters"] = max(1, round(tokens / rows / T))
        values["story_windows"] = trained.get("story_windows", False)
    else:
        kind = "unlikelihood" if options.arm == "unlikelihood" else "dpo"
        values |= {"objective": "prefer", "pairs": folder / "prefer.jsonl", "preference": kind}
    return {"warmup_iters": min(10, values["max_iters"] // 2)} | values | options.settings


def learn(argv: list[str]) -> int:
    """Train as train.py does, without its final report. -> the signal that ended it, or 0."""
    plan = train.configure(argv)
    c, model = plan.config, train.build_model(plan)
    plan.machine.check_run(c)
    trainer = train.Trainer(c, model, plan.data, plan.folder, plan.machine, plan.recipe)
    if plan.state:
        trainer.load_checkpoint(plan.state)
    disk = train.report.CHECKPOINT_BYTES * c.model.estimate()["parameters"]
    with trainer.directory.claim(disk, plan.state, c.max_iters), trainer.requests.handle():
        trainer.directory.write_config(trainer.description() | {"command": ["train.py", *argv]})
        train.train(trainer)
    return trainer.stop


def measure(path: Path, data, check, options) -> dict:
    """Bits per byte of the validation file, and how many of the model's stories are valid."""
    model, tokenizer = checkpoint.load(path, machine.choose_device(options.device))
    found, valid = {"bpb": tasks.validation_loss(model, data, limit=EVAL_TOKENS)[1]}, 0
    for first in range(0, options.judged if check else 0, 100):
        n = min(100, options.judged - first)
        texts = generate.stories(model, tokenizer, "", n, seed=first, temperature=1, top_p=1)
        valid += sum(check(text).ok for text in texts)
    return found | ({"valid": valid, "judged": options.judged} if check else {})


def table(results: list[dict]) -> str:
    """Markdown, from the results of the rounds."""
    rows = [["round", "bits per byte", "valid stories", "writing, s", "training, s"], ["---"] * 5]
    for number, x in enumerate(results):
        valid = stats.proportion("", x.get("valid", 0), x.get("judged", 0))
        shown = f"{stats.digits(valid.value, True)} ({stats.interval(valid)}; {valid.n:,})"
        seconds = (f"{x[key]:.0f}" if key in x else "-" for key in ("writing_s", "training_s"))
        rows.append([str(number), f"{x['bpb']:.4f}", shown if valid.n else "-", *seconds])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def parse(argv: list[str]):
    parser = settings.Parser(description="Train a model to prefer real continuations of stories to its own.")
    parser.add_argument("--out_dir", required=True, help="where the rounds are; rerun to continue")
    parser.add_argument("--init_from", required=True, help="the model to start from: a run or a checkpoint")
    parser.add_argument("--rounds", type=int, default=3, help="each with the texts of the one before")
    parser.add_argument("--arm", choices=ARMS, default="spin", help="which texts are rejected, and how")
    parser.add_argument("--pairs", type=int, default=2000, help="per round")
    parser.add_argument("--data_dir", help="as in train.py; default: where the data of the model were")
    parser.add_argument("--judged", type=int, default=200, help="stories per round of which validity is told")
    parser.add_argument("--device", default="auto", help="as in train.py")
    parser.add_argument("--seed", type=int, default=0, help="of beginnings, texts and training")
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="settings of train.py")
    options = parser.parse_args(argv)
    for name, least in (("rounds", 0), ("pairs", BATCH), ("judged", 0), ("seed", 0)):
        if not least <= getattr(options, name) <= 10**9:
            parser.error(f"--{name} must be between {least} and 10**9, not {getattr(options, name)}")
    pairs = [word.partition("=") for word in options.settings]
    if wrong := [key for key, sign, _ in pairs if not sign]:
        parser.error(f"settings of train.py are written KEY=VALUE, not {wrong[0]!r:.60}")
    options.settings = {key: value for key, _, value in pairs}
    return options


def check_settings(values: dict) -> None:
    """ValueError now rather than after the texts are written, if train.py does not accept the settings."""
    parts = {"model": experiments.architecture(values["architecture"])[0]}
    if "objective" in values:
        parts["objective_config"] = experiments.objective("prefer")[0]
    cls = settings.with_parts(train.TrainConfig, **parts)
    _, _, given, _ = settings.command_line(cls, words(values), {}, "", train.RESOLVED)
    settings.build(cls, given | ({"pairs": __file__} if "objective" in values else {})).validate()


def words(values: dict) -> list[str]:
    return [f"--{key}={value}" for key, value in values.items()]


@script
def main(argv: list[str]) -> int:
    options = parse(argv)
    out, path = Path(options.out_dir), checkpoint.find(options.init_from)
    state, folders = checkpoint.read(path), [out / f"round-{n}" for n in range(options.rounds + 1)]
    if "learning_rate" not in (trained := state.get("train_config", {})):
        raise ValueError(f"{path} was not trained with train.py")
    if machine.world_size() > 1:
        raise ValueError("self-play is for one process: start it without torchrun")
    options.data_dir = options.data_dir or trained["data_dir"]
    data = load_data(Path(options.data_dir, trained["dataset"], trained["tokenizer"]), trained["stories"])
    check = sources.corpus(trained["dataset"]).check
    if options.arm in ("invalid", "unlikelihood") and not check:
        raise ValueError(f"--arm {options.arm} needs a corpus with a checker: toystories")
    check_settings(settings_of_round(options, state, data.meta, path, folders[0], 0))
    known, mine = out / "options.json", {k: v for k, v in vars(options).items() if k not in MAY_CHANGE}
    before = json.loads(known.read_text()) if known.exists() else mine
    if changed := [f"{key}={before.get(key)}" for key in mine if mine[key] != before.get(key)]:
        raise ValueError(f"{out} has rounds with {', '.join(changed)}: choose another --out_dir")
    folders[0].mkdir(parents=True, exist_ok=True)
    write(known, json.dumps(mine, indent=1))
    results = []
    for number, folder in enumerate(folders):  # round 0 is the model of init_from
        previous, path = path, folder / "latest.pt" if number else path
        result, found = folder / "result.json", {}
        if number and not result.exists():
            folder.mkdir(exist_ok=True)
            if options.arm != "plain":
                found = make_pairs(folder, previous, data, check, options, number)
            values = settings_of_round(options, state, data.meta, previous, folder, number)
            resume = ["--resume"] if (folder / "metrics.jsonl").exists() else []
            if stop := learn([*words(values), *resume]):
                print("the work is saved: the same command continues", file=sys.stderr)
                return 128 + stop
            found["training_s"] = runs.read_metrics(folder)[-1]["elapsed_s"]
        if not result.exists():
            write(result, json.dumps(found | measure(path, data, check, options), indent=1))
        results.append(json.loads(result.read_text()))
    print(table(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
