"""
Output of a run: the plan, loggers, progress bar, and the final report.
"""

import contextlib
import functools
import math
import shlex
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
from tqdm import tqdm

from nanostlm import checkpoint, runs, sources
from nanostlm.machine import Machine, print0, rank, total_memory

CHECKPOINT_BYTES = 44  # disk space per parameter: two full states of 16 bytes, best.pt, one being written
SAMPLE_TOKENS = 40  # length of a sample during training
FINAL_TOKENS = 1_000_000  # of the validation file, scored at the end of a run: 15 s on a CPU


@contextlib.contextmanager
def optional(what: str) -> Iterator[None]:
    """Turn any exception inside into a warning, because the run does not depend on `what`."""
    try:
        yield
    except Exception as error:
        print0(f"WARNING: {what} failed: {type(error).__name__}: {error}")


def plan(c, data, machine: Machine, iters: int) -> str:
    """The plan of a run of `iters` updates in a few lines, computed before anything is allocated."""
    m, sizes = c.model, c.model.estimate()
    total, share = sizes["parameters"], sizes["embedding_parameters"] / sizes["parameters"]
    rows, stories = c.batch_size * c.gradient_accumulation_steps, data.meta["train"]["stories"]
    tokens, files = rows * m.block_size, CHECKPOINT_BYTES * total
    need, has = machine.run_memory(c), total_memory(machine.device)
    shape = f"{m.n_layer} layers, {m.n_embd} wide" if c.architecture == "gpt" else c.architecture
    warning = f"; WARNING: this machine has only {has / 2**20:,.0f} MB of memory" if need > has else ""
    return (
        f"model    {total / 1e6:.2f}M parameters, {share:.0%} of them embeddings; "
        f"{shape}, context {m.block_size}\n"
        f"data     {data.folder}: {stories:,} stories, {len(data.train) / 1e6:.2f}M tokens\n"
        f"batch    {rows} rows x {m.block_size} = {tokens:,} tokens a step; {iters:,} steps = "
        f"{iters * tokens / 1e6:.1f}M tokens = {iters * tokens / len(data.train):.2f} epochs\n"
        f"machine  {machine.description}, {'compiled' if machine.compile else 'not compiled'}\n"
        f"needs    about {need / 2**20:,.0f} MB of memory, {files / 2**20:,.0f} MB of disk{warning}"
    )


def logger(c, folder: Path | None) -> Callable[[dict], None] | None:
    """A function that logs a line of metrics to TensorBoard or W&B, which are imported on demand."""
    if not c.logger or folder is None:
        return None
    try:
        if c.logger == "wandb":
            import wandb
        else:
            from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ValueError(f"logger={c.logger} needs another package: pip install {c.logger}") from None

    @functools.cache
    def opened():  # on the first call, after the run directory has been claimed
        if c.logger == "tensorboard":
            return SummaryWriter(folder)
        return wandb.init(project="nanostlm", id=folder.name, resume="allow", dir=folder, config=asdict(c))

    def write(line: dict) -> None:
        values = {f"{line['split']}/{key}": x for key, x in line.items() if key not in ("split", "step")}
        if c.logger == "wandb":
            return opened().log(values, step=line["step"])
        for key, x in values.items():
            opened().add_scalar(key, x, line["step"])
        opened().flush()

    return write


class Console:
    """
    The progress bar of the training loop, or periodic lines without a terminal. MFU is the speed
    of the model's operations as a share of the measured speed of matrix products.
    """

    def __init__(self, trainer):
        c, machine = trainer.config, trainer.machine
        self.max_iters, self.log_interval = c.max_iters, c.log_interval
        self.tokens_per_step, self.val = trainer.tokens_per_step, ""
        self.flops_per_token = c.model.estimate()["flops_per_token"]
        self.matmul_rate = machine.matmul_rate()
        self.quiet = not sys.stderr.isatty() or rank() > 0
        self.bar = tqdm(total=c.max_iters, initial=trainer.progress.step, unit="step", disable=self.quiet)

    def __enter__(self) -> "Console":
        return self

    def __exit__(self, *error) -> None:
        self.bar.close()

    def mfu(self, tokens_per_s: float) -> float:
        return tokens_per_s * self.flops_per_token / self.matmul_rate

    def show(self, line: dict) -> None:
        """Show a line of metrics."""
        step, loss = line["step"], line["loss"]
        if line["split"] == "val":
            self.val = f", val {loss:.3f}"
            return print0(f"step {step:6,}  val loss {loss:.4f}  {line['bpb']:.4f} bits per byte")
        speed = line["tokens_per_s"]
        rate = f"{speed:,} tokens/s, {self.mfu(speed):.0%} MFU"
        self.bar.set_postfix_str(f"loss {loss:.3f}{self.val}, lr {line['lr']:.2g}, {rate}")
        if self.quiet and (step == 1 or step % (10 * self.log_interval) == 0):
            left = (self.max_iters - step) * self.tokens_per_step / max(1, speed)
            print0(
                f"step {step:6,}  loss {loss:.4f}  lr {line['lr']:.2g}  {speed:,} tokens/s  {left:.0f} s left"
            )

    def sample(self, trainer) -> None:
        """Print a sample from the current model. Does not change the RNG state."""
        from nanostlm import generate

        if rank() == 0:
            with optional("the sample"):
                prompt, seed = trainer.config.prompt, trainer.config.seed
                tokenizer = trainer.data.tokenizer
                [text] = generate.stories(
                    trainer.model, tokenizer, prompt, max_new_tokens=SAMPLE_TOKENS, seed=seed
                )
                print0(f"    {' '.join(text.split())}")


def plot(metrics: dict[Path, list[dict]], floor: float | None) -> None:
    """
    Write loss.png of the first run: loss against tokens, a second run in grey, and the entropy of the corpus
    (`floor`, nats per token) if it is known.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (axes, below) = pyplot.subplots(2, 1, figsize=(8, 7), sharex=True, height_ratios=(3, 1))
    this_run = {"train": ("tab:blue", "train"), "val": ("tab:orange", "val")}
    earlier = {"train": ("0.8", None), "val": ("0.6", "the run before")}
    for lines, style in reversed(list(zip(metrics.values(), (this_run, earlier), strict=False))):
        for split, (color, label) in style.items():
            x, y = ([line[k] for line in lines if line["split"] == split] for k in ("tokens", "loss"))
            axes.plot(x, y, color=color, label=label, linewidth=1 if split == "train" else 2)
    if floor:
        axes.axhline(floor, color="tab:green", linestyle="--", label="entropy of the corpus")
    folder, lines = next(iter(metrics.items()))
    losses = [line["loss"] for line in lines if math.isfinite(line["loss"])]
    if losses:  # exclude the high initial losses from the y range
        low, high = min([*losses, *([floor] if floor else [])]), np.percentile(losses, 95)
        axes.set_ylim(low - 0.05 * (high - low) - 1e-3, high + 0.05 * (high - low) + 1e-3)
    axes.set(ylabel="loss (nats per token)")
    axes.set_title(str(folder), parse_math=False)
    axes.legend()
    steps = [line for line in lines if line["split"] == "train"]
    tokens = [line["tokens"] for line in steps]
    below.plot(tokens, [line["lr"] for line in steps], color="tab:purple")
    below.set(xlabel="tokens", ylabel="learning rate")
    norms = below.twinx()
    norms.plot(tokens, [line["grad_norm"] for line in steps], color="0.6", linewidth=1)
    norms.set(ylabel="gradient norm")
    figure.savefig(folder / "loss.png", dpi=120, bbox_inches="tight")
    pyplot.close(figure)


def comparison(rows: list[tuple[Path, dict, float]]) -> str:
    """
    A table of (checkpoint file, its dictionary, bits per byte): one line per run, with the settings in which
    the runs differ.
    """
    flat = [checkpoint.flat_settings(state) for _, state, _ in rows]
    names = [n for n in dict.fromkeys(k for c in flat for k in c) if n != "out_dir"]
    differ = [n for n in names if len({repr(c.get(n)) for c in flat}) > 1]
    table = [["run", *differ, "parameters", "tokens", "seconds", "bits per byte"]]
    for (path, state, bpb), c in zip(rows, flat, strict=True):
        lines = [x for x in runs.read_metrics(path.parent) if x["step"] <= state.get("step", 0)]
        end = lines[-1] if lines else {}
        tokens = f"{end['tokens']:,}" if "tokens" in end else "-"
        seconds = f"{end['elapsed_s']:,.0f}" if "elapsed_s" in end else "-"
        size = checkpoint.classes(state)[0](**state["model_config"]).estimate()["parameters"]
        settings = [str(c.get(n, "-")) for n in differ]
        table.append([str(path.parent), *settings, f"{size / 1e6:.2f}M", tokens, seconds, f"{bpb:.4f}"])
    width = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    return "\n".join(
        "  ".join(cell.ljust(w) for cell, w in zip(row, width, strict=True)).rstrip() for row in table
    )


def plot_runs(folders: list[Path], file: str | Path) -> None:
    """Draw the validation curves of several runs, bits per byte against tokens and against seconds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(10, 4), sharey=True)
    curves = []
    for folder in folders:
        lines = [x for x in runs.read_metrics(folder) if x["split"] == "val"]
        if not lines:
            raise ValueError(f"{folder} has no metrics.jsonl with evaluations: --plot takes run directories")
        for axes, key in zip(panels, ("tokens", "elapsed_s"), strict=True):
            [curve] = axes.plot([x[key] for x in lines], [x["bpb"] for x in lines], marker=".")
        curves.append(curve)
    panels[0].set(xlabel="tokens", ylabel="bits per byte")
    panels[1].set(xlabel="seconds")
    for label in panels[1].legend(curves, map(str, folders), frameon=False).get_texts():
        label.set_parse_math(False)  # the name of a directory is no formula
    figure.savefig(file, dpi=120, bbox_inches="tight")
    pyplot.close(figure)


def load_best(trainer) -> None:
    """Load the weights of the best evaluation unless they are the last ones."""
    best = trainer.directory.folder / "best.pt"
    if best.exists():
        state = checkpoint.read(best)
        if state["step"] != trainer.progress.step:
            trainer.model.load_state_dict(state["model"])
            print0(f"the following uses the best weights, from step {state['step']:,}")


def summary(trainer, lines: list[dict], val: tuple[float, float, int]) -> str:
    """The result of a run as lines of `name: value`, for grep. `val`: as tasks.validation_loss returns it."""
    speed = [line["tokens_per_s"] for line in lines if line["split"] == "train"]
    found = {
        "val_bpb": f"{val[1]:.4f}",
        "val_loss": f"{val[0]:.4f}",
        "val_tokens": val[2],
        "steps": trainer.progress.step,
        "tokens": trainer.progress.step * trainer.tokens_per_step,
        "seconds": round(lines[-1]["elapsed_s"]) if lines else 0,
        "tokens_per_s": round(float(np.median(speed))) if speed else 0,
        "peak_memory_mb": f"{trainer.machine.peak_memory():.0f}",
        "parameters": trainer.config.model.estimate()["parameters"],
    }
    return "\n".join(f"{name}: {value}" for name, value in found.items())


def totals(trainer, metrics: dict[Path, list[dict]]) -> str:
    """Tokens, time and memory of a run, and the best evaluation of each run in `metrics`."""
    lines, progress = next(iter(metrics.values())), trainer.progress
    speed = [line["tokens_per_s"] for line in lines if line["split"] == "train"]
    tokens, seconds = progress.step * trainer.tokens_per_step, lines[-1]["elapsed_s"] if lines else 0
    found = [
        f"\n{progress.step:,} updates, {tokens / 1e6:.2f}M tokens = {tokens / len(trainer.data.train):.2f} "
        f"epochs in {seconds:.0f} s; {np.median(speed) if speed else 0:,.0f} tokens/s; "
        f"peak memory {trainer.machine.peak_memory():,.0f} MB",
        f"{tokens * trainer.config.model.estimate()['flops_per_token']:.3g} FLOPs",
    ]
    if not math.isnan(joules := trainer.joules):
        found[-1] += f", {joules:,.0f} J, {joules / tokens * 1e6:,.0f} J per million tokens"
    for run, lines in metrics.items():
        if val := [line for line in lines if line["split"] == "val"]:
            best = min(val, key=lambda line: line["loss"])
            found.append(
                f"best val loss {best['loss']:.4f} nats a token, {best['bpb']:.4f} bits per byte "
                f"(step {best['step']}) in {run}"
            )
    if progress.skipped:
        found.append(f"{progress.skipped} updates were skipped because of a non-finite loss or gradient")
    return "\n".join(found)


def final(trainer, name: str) -> None:
    """
    The end of a run: curve, totals next to the recipe's previous run on the same data, the loss on the
    validation file, stories, the next command. The run is finished, so each part may fail with a warning.
    """
    from nanostlm import generate, stats, tasks

    c, data, model = trainer.config, trainer.data, trainer.model.eval()
    folder, val = trainer.directory.folder, data.meta["val"]
    metrics = {folder: runs.read_metrics(folder)}
    with optional("the comparison with an earlier run"):
        earlier = [run for run in runs.folders_of(name) if run != folder and (run / "metrics.jsonl").exists()]
        same = [run for run in earlier if runs.read_config(run).get("data") == trainer.fingerprint]
        metrics |= {run: runs.read_metrics(run) for run in same[:1]}
    with optional("loss.png"):
        floor, bytes_per_token = data.meta.get("floor_bpb"), (val["bytes"] + val["stories"]) / val["tokens"]
        plot(metrics, floor and floor * math.log(2) * bytes_per_token)
    with optional("the report"):
        print0(totals(trainer, metrics))
        load_best(trainer)
    scored = math.nan, math.nan, 0
    with optional("the score"):  # in float32, as in evaluate.py
        scored = tasks.validation_loss(model, data, c.batch_size, FINAL_TOKENS)
        print0(
            f"on {scored[2]:,} tokens of val.bin: {scored[0]:.4f} nats a token, {scored[1]:.4f} bits per byte"
        )
    if sources.corpus(data.meta["corpus"]).check:
        with optional("the comparison with the grammar"):
            texts = tasks.validation_texts(data)
            result = tasks.grammar(tasks.Subject(str(folder), model, data.tokenizer, data, texts))
            print0(stats.table({str(folder): [("grammar", figure) for figure in result.figures]}))
    with optional("the stories"):
        for text in generate.stories(model, data.tokenizer, c.prompt, 3, seed=c.seed):
            print0(f"\n{text}")
    command = shlex.join(["python", "sample.py", f"--out_dir={folder}", f"--prompt={c.prompt}"])
    print0(f"\ncurve: {folder / 'loss.png'}\nnext:  {command}")
    print(summary(trainer, metrics[folder], scored), flush=True)
