"""
Evaluate checkpoints: a table of figures, each with its 95% confidence interval and number of items.

    python evaluate.py                                    # bits per byte of the newest run
    python evaluate.py out/tiny out/tiny-2                # a column per run, then the settings that differ
    python evaluate.py --tasks bpb,progression,stories --json figures.json
    python evaluate.py --tasks blimp --blimp ../blimp     # a clone of https://github.com/alexwarstadt/blimp
    python evaluate.py --tasks stories --sweep            # compare settings of the sampler
    python evaluate.py --tasks probe:toystories-plot      # or probe:FILE.jsonl, with fields text and label
    python evaluate.py --tasks lm_eval:arc_easy           # EleutherAI's harness; or lm_eval:FILE.yaml
    python evaluate.py --out_dir hf:gpt2 --text file.txt  # a transformers model

`python evaluate.py --help` lists the tasks and options.
"""

from nanostlm.entry import script  # first, to handle signals during the other imports
import argparse
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from nanostlm import checkpoint, data, machine, report, settings, sources, stats, story_stats, tasks
from nanostlm.fast_decoding import quantize
from nanostlm.generate import check_range
from nanostlm.stats import Result
from nanostlm.tasks import Subject

TASKS = {
    "bpb": "nats per token, perplexity, bits per byte and per character of validation stories (the default)",
    "grammar": "distance to the known entropy, valid stories (toystories only, where it is a default, too)",
    "blimp": "minimal pairs: 67 paradigms, 12 phenomena; needs --blimp",
    "progression": "real second halves of stories against 16 corruptions of them",
    "stories": "generated stories beside validation stories: diversity, repetition, memorization",
    "lm_eval:TASK": "a task of EleutherAI's harness by its name, or a YAML file",
    "probe:FILE": "linear probes of each layer; fields text, label; or toystories-plot, toystories-pronoun",
}
DEFAULT = ["bpb", "grammar"]
PATHS = {"data": "folder", "text": "file", "blimp": "folder", "json": "file", "plot": "file"}


def parse(argv: list[str]) -> argparse.Namespace:
    lines = [f"  {name:14s} {help}" for name, help in TASKS.items()]
    parser = settings.Parser(
        description="Evaluate checkpoints.",
        epilog="tasks:\n" + "\n".join(lines),
        formatter_class=partial(argparse.RawDescriptionHelpFormatter, max_help_position=34, width=110),
    )
    add = parser.add_argument
    add(
        "runs",
        nargs="*",
        metavar="RUN",
        help="runs, checkpoint files or hf:FOLDER_OR_ID; none: the newest run",
    )
    add("--out_dir", help="the same for a single model")
    add("--tasks", action="append", metavar="NAME,...", help="what to evaluate, see below")
    add(
        "--data",
        "--dataset",
        metavar="DIR",
        help="directory written by prepare.py; default: the training data",
    )
    add("--text", metavar="FILE", help="score this text instead (.jsonl and .parquet: the field text)")
    add("--blimp", metavar="DIR", help="the .jsonl files of BLiMP")
    add("--stride", type=int, default=0, help="bpb: advance by N tokens per window (default: whole windows)")
    add("--limit", type=int, help="use the first N stories, pairs per paradigm, or items of each task")
    add("--sweep", action="store_true", help="stories: compare settings of the sampler")
    add("--seed", type=int, default=1337, help="of generated stories and corruptions (default: %(default)s)")
    add("--rows", type=int, default=16, help="windows per batch (default: %(default)s)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps (default: %(default)s)")
    dtypes = ["float32", "int8"]
    add("--dtype", default="float32", choices=dtypes, help="of the weights (default: %(default)s)")
    add("--json", metavar="FILE", help="write all figures to this file")
    add("--items", action="store_true", help="--json: also the result of every item")
    add("--plot", metavar="FILE", help="draw the runs' loss curves, against tokens and against seconds")
    options = parser.parse_args(argv)
    check_range("rows", options.rows, 1 <= options.rows <= 4096, "between 1 and 4,096")
    check_range("limit", options.limit, options.limit is None or options.limit > 0, "1 or more")
    check_range("stride", options.stride, options.stride >= 0, "0 (whole windows) or more")
    options.runs = (options.runs + [options.out_dir] * (options.out_dir is not None)) or [None]
    for name, kind in PATHS.items():
        settings.check_path(f"--{name}", getattr(options, name), kind)
    if options.text and not Path(options.text).is_file():
        raise FileNotFoundError(f"there is no file {options.text}")
    if options.json and not Path(options.json).parent.is_dir():
        raise FileNotFoundError(f"there is no folder {Path(options.json).parent} for --json")
    options.tasks = [name for names in options.tasks or () for name in names.split(",")]
    kinds = {name.split(":")[0] + ":" * (":" in name) for name in TASKS}
    for name in options.tasks:
        kind, colon, argument = name.partition(":")
        if kind + colon not in kinds or bool(colon) != bool(argument):
            parser.error(f"there is no task {name!r}: there are {', '.join(TASKS)}")
    if "blimp" in options.tasks and not options.blimp:
        parser.error("task blimp needs --blimp DIR, a clone of https://github.com/alexwarstadt/blimp")
    if options.sweep and "stories" not in options.tasks:
        parser.error("--sweep belongs to --tasks stories")
    if options.items and not options.json:
        parser.error("--items belongs to --json")
    return options


def load(name: str | None, options: argparse.Namespace) -> tuple[Subject, Path | None, dict]:
    """The model `name` and the texts to score; its checkpoint's path and dictionary (hf: None, empty)."""
    device, path, state, folder = machine.choose_device(options.device), None, {}, options.data
    if options.dtype == "int8":
        machine.inference_dtype("int8", device)  # refuses devices without its kernel
    if str(name).startswith("hf:"):
        from experiments import hf

        if options.dtype == "int8":
            raise ValueError("--dtype=int8 is for our own models, not for hf:")
        model, tokenizer = hf.load(name, device)
    else:
        path = checkpoint.find(name)
        model, tokenizer, state = checkpoint.build(path, device)
        if options.dtype == "int8":
            quantize(model)
    trained, stories = state.get("train_config"), 0
    if trained and not folder:
        own = Path(trained["data_dir"], trained["dataset"], trained["tokenizer"])
        folder, stories = own if own.is_dir() else None, trained.get("stories", 0)
    found = data.load_data(folder, stories, tokenizer if path else None) if folder else None
    texts, source = [], ""
    if options.text:
        texts, source = [text for text in sources.read_files([options.text]) if text], options.text
    elif found:
        texts, source = tasks.validation_texts(found), f"{found.folder}/val.bin"
    if source and not texts:
        raise ValueError(f"{source} has no text")
    return Subject(str(path or name), model, tokenizer, found, texts, source), path, state


def chosen(subject: Subject, options: argparse.Namespace) -> dict[str, Callable[[], Result]]:
    """The tasks for a model: name -> a function that evaluates it."""
    limit = {} if options.limit is None else {"limit": options.limit}
    rows, seed = {"rows": options.rows}, {"seed": options.seed}
    known = {
        "bpb": partial(tasks.bpb, subject, stride=options.stride, **limit, **rows),
        "grammar": partial(tasks.grammar, subject, **limit, **rows, **seed),
        "blimp": partial(tasks.blimp, subject, options.blimp, **limit, **rows),
        "progression": partial(tasks.progression, subject, **limit, **rows, **seed),
        "stories": partial(
            story_stats.sweep if options.sweep else story_stats.stories, subject, **limit, **seed
        ),
    }
    if not options.tasks:
        entropy = subject.data and not options.text and sources.corpus(subject.data.meta["corpus"]).check
        return {name: known[name] for name in (DEFAULT if entropy else DEFAULT[:1])}
    for name in options.tasks:
        kind, _, argument = name.partition(":")
        if kind == "lm_eval":
            from nanostlm import harness

            known[name] = partial(harness.run, subject, [argument], **limit, **rows)
        elif kind == "probe":
            from nanostlm import probe

            known[name] = partial(probe.probe, subject, argument, **limit, **rows)
    return {name: known[name] for name in options.tasks}


def write_json(path: str, content: dict) -> None:
    """Replace the file atomically: an interruption leaves what was there."""
    part = Path(f"{path}.part")
    part.write_text(json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False), encoding="utf-8")
    part.replace(path)


@script
def main(argv: list[str]) -> None:
    options = parse(argv)
    columns, runs, results, notes = {}, [], {}, []
    try:
        for run in options.runs:
            subject, path, state = load(run, options)
            columns[subject.name], results[subject.name] = [], {}
            for name, evaluate in chosen(subject, options).items():
                began = time.perf_counter()
                result = evaluate()
                seconds = time.perf_counter() - began
                columns[subject.name] += [(name, figure) for figure in result.figures]
                title = f"{subject.name}, {name}" if len(options.runs) > 1 else name
                notes += [f"{title}: {note}" for note in [*result.notes, f"{seconds:.0f} s"]]
                results[subject.name][name] = result.as_dict(options.items) | {"seconds": seconds}
                if name == "bpb" and path:
                    runs.append((path, state, result.figures[0].value))
                if options.json:
                    write_json(options.json, results)
    finally:  # after Ctrl-C, what is done so far
        if any(columns.values()):
            print(stats.table(columns), "", *notes, sep="\n", flush=True)
    if len(runs) > 1:
        print(f"\n{report.comparison(runs)}")
    if options.plot:
        folders = [Path(run) for run in options.runs if run and not run.startswith("hf:")] or [
            checkpoint.newest_run()
        ]
        report.plot_runs(folders, options.plot)


if __name__ == "__main__":
    sys.exit(main())
