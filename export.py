"""
Write a trained model in the format of another program.

    python export.py --to hf out/tiny-hf           # a folder for AutoModelForCausalLM and AutoTokenizer
    python export.py --to llama2c llama.bin out/llama          # run.c's model file, and tokenizer.bin
    python export.py --to html story.html          # one file that writes stories in any browser, offline
    python train.py config/finetune.py --init_from=hf:out/tiny-hf    # the way back; or a Hub id: hf:gpt2

The exported model gives the same logits and the same tokens; the page's weights are rounded to int8. An
unsupported setting is an error that names it. The padding of the vocabulary is left out; except in the page,
shared layers are written out for each layer, and LoRA is merged.
"""

from nanostlm.entry import script  # first, to handle signals during the other imports
import shlex
import sys
from pathlib import Path

from experiments import name_of
from nanostlm import checkpoint, settings
from nanostlm.formats import hf, html, llama2c


@script
def main(argv: list[str]) -> None:
    parser = settings.Parser(description="Write a trained model in the format of another program.")
    parser.add_argument(
        "--to",
        choices=["hf", "llama2c", "html"],
        required=True,
        help="hf: a folder for transformers; llama2c: a file for run.c; html: a page for browsers",
    )
    parser.add_argument("dest", metavar="DEST", help="the folder, or the file")
    parser.add_argument(
        "run", nargs="?", metavar="RUN", help="a run or a checkpoint; none: the newest run in out/"
    )
    parser.add_argument("--out_dir", help="the same as RUN")
    parser.add_argument("--overwrite", action="store_true", help="overwrite an earlier export")
    options = parser.parse_args(argv)
    if options.run and options.out_dir:
        parser.error("RUN and --out_dir are the same option: leave one out")

    settings.check_path("DEST", options.dest, "folder" if options.to == "hf" else "file")
    dest = Path(options.dest)
    files = {
        "hf": [dest / "config.json"],
        "llama2c": [dest, dest.with_name("tokenizer.bin")],
        "html": [dest],
    }[options.to]
    if files[0] == files[-1] and options.to == "llama2c":
        raise ValueError("tokenizer.bin is the name of the vocabulary beside the model: choose another DEST")
    existing = [str(file) for file in files if file.exists()]
    if existing and not options.overwrite:
        raise ValueError(f"{existing[0]} exists; use --overwrite to replace it")
    source = checkpoint.find(options.out_dir if options.run is None else options.run)
    model, tokenizer, state = checkpoint.build(source)
    if (name := name_of(model)) != "gpt":
        raise ValueError(f"{source} has architecture={name}, which other programs do not know")
    print(f"{source}: {model.config.estimate()['parameters'] / 1e6:.1f}M parameters, {tokenizer.name}")
    if options.to == "hf":
        name = hf.to_hf(model, tokenizer, dest)
        print(f"{dest}: {name}, for AutoModelForCausalLM and AutoTokenizer")
    elif options.to == "html":
        print(html.export(model, tokenizer, state, source, dest))
    else:
        vocabulary = llama2c.to_llama2c(model, tokenizer, dest)
        command = ["./run", str(dest), "-z", str(vocabulary), "-t", "0", "-i", "Once upon a time"]
        print(f"{dest}, {vocabulary}: {shlex.join(command)}")


if __name__ == "__main__":
    sys.exit(main())
