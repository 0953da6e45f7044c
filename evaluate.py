"""
Evaluate checkpoints: bits per byte of validation stories, comparable across tokenizers. For toystories, whose
entropy is known, also the excess over the entropy and the fraction of generated stories that are valid.

    python evaluate.py                                    # the newest run, on the data it was trained on
    python evaluate.py out/tiny out/tiny-2                # one row per run, with the settings that differ
    python evaluate.py out/tiny out/tiny-2 --plot both.png
    python evaluate.py out/tiny --data data/mine/bpe4096  # other data, prepared with the same tokenizer
"""

from nanostlm.entry import script  # first, to handle signals during the other imports
import argparse
import sys
from pathlib import Path

import torch

from nanostlm import checkpoint, machine, report, settings, sources, tasks
from nanostlm.data import Data, load_data
from nanostlm.generate import check_range, quantize


def parse(argv: list[str]) -> argparse.Namespace:
    parser = settings.Parser(description="Bits per byte of checkpoints on validation stories.")
    add = parser.add_argument
    add("runs", nargs="*", metavar="RUN", help="run directories or checkpoint files; none: the newest run")
    add("--out_dir", help="the same for a single run")
    add("--data", help="directory written by prepare.py; without it, the data that the model was trained on")
    add("--tasks", help="comma-separated: bpb, grammar (only toystories has one); default: all that apply")
    add("--rows", type=int, default=16, help="windows per batch (default: %(default)s)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps (default: %(default)s)")
    dtypes = ["float32", "int8"]
    add("--dtype", default="float32", choices=dtypes, help="of the weights (default: %(default)s)")
    add("--plot", metavar="FILE", help="draw the runs' loss curves, against tokens and against seconds")
    options = parser.parse_args(argv)
    check_range("rows", options.rows, 1 <= options.rows <= 4096, "between 1 and 4,096")
    options.runs += [] if options.out_dir is None else [options.out_dir]
    settings.check_path("--data", options.data, "folder")
    settings.check_path("--plot", options.plot, "file")
    options.tasks = options.tasks.split(",") if options.tasks else None
    if unknown := set(options.tasks or ()) - {"bpb", "grammar"}:
        parser.error(f"unknown task {', '.join(sorted(unknown))}: there are bpb and grammar")
    return options


def load(path: Path, options: argparse.Namespace) -> tuple[torch.nn.Module, Data, dict]:
    """The model of a checkpoint, the data to score it on, and the checkpoint's dictionary."""
    device = machine.choose_device(options.device)
    if options.dtype == "int8":
        machine.inference_dtype("int8", device)  # refuses devices without its kernel
    model, tokenizer, state = checkpoint.build(path, device)
    folder = options.data
    if folder is None:
        if "train_config" not in state:
            raise ValueError(f"{path} does not name its training data: pass --data")
        trained = state["train_config"]
        folder = f"{trained['data_dir']}/{trained['dataset']}/{trained['tokenizer']}"
    data = load_data(folder, tokenizer=tokenizer)
    if options.dtype == "int8":
        quantize(model)
    return model, data, state


@script
def main(argv: list[str]) -> None:
    options = parse(argv)
    rows = []
    for path in map(checkpoint.find, options.runs or [None]):
        model, data, state = load(path, options)
        grammar = sources.corpus(data.meta["corpus"]).check
        if options.tasks is None or "bpb" in options.tasks:
            nats, bpb, n_tokens = tasks.validation_loss(model, data, options.rows)
            source = f"{n_tokens:,} tokens of {data.folder}/val.bin"
            print(f"{path}: {nats:.4f} nats a token, {bpb:.4f} bits per byte ({source})", flush=True)
            rows.append((path, state, bpb))
        if "grammar" in options.tasks if options.tasks else grammar:
            if not grammar:
                raise ValueError(f"task grammar is not available for {data.meta['corpus']}")
            print(*tasks.grammar_report(model, data, options.rows), sep="\n", flush=True)
    if len(rows) > 1:
        print(report.comparison(rows))
    if options.plot:
        report.plot_runs([Path(run) for run in options.runs] or [checkpoint.newest_run()], options.plot)


if __name__ == "__main__":
    sys.exit(main())
