"""
Evaluate a checkpoint: bits per byte of validation stories, which compare across tokenizers. For toystories,
a corpus whose entropy is known, also the distance to the entropy and the share of valid generated stories.

    python evaluate.py [--out_dir DIR] [--data DIR]    # the newest run, on the data that it was trained on
"""

import sys

from nanostlm import checkpoint, settings, sources, tasks
from nanostlm import data as datasets
from nanostlm.generate import check_range, quantize


@settings.script
def main(argv: list[str]) -> None:
    parser = settings.Parser(description="Bits per byte of a checkpoint on validation stories.")
    add = parser.add_argument
    add("--out_dir", help="run directory or checkpoint file; without it, the newest run in out/")
    add("--data", help="directory written by prepare.py; without it, the data that the model was trained on")
    add("--rows", type=int, default=16, help="windows per batch (default: 16)")
    add(
        "--dtype",
        default="float32",
        choices=["float32", "int8"],
        help="dtype of the weights (default: float32)",
    )
    options = parser.parse_args(argv)
    check_range("rows", options.rows, options.rows >= 1, "1 or more")

    path = checkpoint.find(options.out_dir or checkpoint.newest_run())
    state = checkpoint.read(path)
    model, tokenizer = checkpoint.build(state)
    if options.data is None:
        if "train_config" not in state:
            raise ValueError(f"{path} does not say what data it was trained on: give --data")
        trained = state["train_config"]
        options.data = f"{trained['data_dir']}/{trained['dataset']}/{trained['tokenizer']}"
    data = datasets.load_data(options.data)
    if data.tokenizer.sha256 != tokenizer.sha256:
        raise ValueError(f"{data.folder} was made with another tokenizer than {path}")
    if options.dtype == "int8":
        quantize(model)

    nats, bpb, n_tokens = tasks.validation_loss(model, data, options.rows)
    source = f"{n_tokens:,} tokens of {data.folder}/val.bin"
    print(f"{path}: {nats:.4f} nats a token, {bpb:.4f} bits per byte ({source})")
    if sources.corpus(data.meta["corpus"]).check:
        print(*tasks.grammar_report(model, data, options.rows), sep="\n")


if __name__ == "__main__":
    sys.exit(main())
