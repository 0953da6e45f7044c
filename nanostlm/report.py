"""
What a run says: the plan before it, the loggers during it, the curve, summary and stories after it.
"""

import functools
import math
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
from tqdm import tqdm

from model import GPTConfig
from nanostlm import checkpoint, runs, sources
from nanostlm.machine import Machine, print0, rank

CHECKPOINT_BYTES = 44  # disk space per parameter: two full states of 16 bytes, best.pt, one being written


def plan(c, data, machine: Machine, iters: int) -> str:
    """The plan of a run of `iters` updates in a few lines, computed before anything is allocated."""
    m, sizes = c.model, c.model.estimate()
    total, share = sizes["parameters"], sizes["embedding_parameters"] / sizes["parameters"]
    rows, stories = c.batch_size * c.gradient_accumulation_steps, data.meta["train"]["stories"]
    tokens = rows * m.block_size
    memory = m.memory(c.batch_size * m.block_size, machine.dtype.itemsize) + machine.base_memory()
    return (
        f"model    {total / 1e6:.2f}M parameters, {share:.0%} of them embeddings; "
        f"{m.n_layer} layers, {m.n_embd} wide, context {m.block_size}\n"
        f"data     {data.folder}: {stories:,} stories, {len(data.train) / 1e6:.2f}M tokens\n"
        f"batch    {rows} rows x {m.block_size} = {tokens:,} tokens a step; {iters:,} steps = "
        f"{iters * tokens / 1e6:.1f}M tokens = {iters * tokens / len(data.train):.2f} epochs\n"
        f"machine  {machine.description}, {'compiled' if machine.compile else 'not compiled'}\n"
        f"needs    about {memory / 2**20:,.0f} MB of memory, {disk(total) / 2**20:,.0f} MB of disk"
    )


def disk(parameters: int) -> int:
    """Bytes that the checkpoints of a run take."""
    return CHECKPOINT_BYTES * parameters


def logger(c, folder: Path | None) -> Callable[[dict], None] | None:
    """A function that takes lines of metrics, for TensorBoard or W&B, imported only when requested."""
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
    def opened():  # at the first line, when the directory belongs to this run
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
    The progress bar of a training loop, or a line now and then where there is no terminal. MFU is the speed
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
    if losses:  # the first updates, far above the rest, do not squeeze the end of the run
        low, high = min([*losses, *([floor] if floor else [])]), np.percentile(losses, 95)
        axes.set_ylim(low - 0.05 * (high - low) - 1e-3, high + 0.05 * (high - low) + 1e-3)
    axes.set(ylabel="loss (nats per token)", title=str(folder).replace("$", r"\$"))
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
    flat = [state.get("train_config", {}) | state["model_config"] for _, state, _ in rows]
    names = [n for n in dict.fromkeys(k for c in flat for k in c) if n not in ("out_dir", "model")]
    differ = [n for n in names if len({repr(c.get(n)) for c in flat}) > 1]
    table = [["run", *differ, "parameters", "tokens", "seconds", "bits per byte"]]
    for (path, state, bpb), c in zip(rows, flat, strict=True):
        lines = [x for x in runs.read_metrics(path.parent) if x["step"] <= state.get("step", 0)]
        end = lines[-1] if lines else {}
        tokens = f"{end['tokens']:,}" if "tokens" in end else "-"
        seconds = f"{end['elapsed_s']:,.0f}" if "elapsed_s" in end else "-"
        size = GPTConfig(**state["model_config"]).estimate()["parameters"]
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
    for folder in folders:
        lines = [x for x in runs.read_metrics(folder) if x["split"] == "val"]
        if not lines:
            raise ValueError(f"{folder} has no metrics.jsonl with evaluations: --plot takes run directories")
        for axes, key in zip(panels, ("tokens", "elapsed_s"), strict=True):
            axes.plot([x[key] for x in lines], [x["bpb"] for x in lines], marker=".", label=str(folder))
    panels[0].set(xlabel="tokens", ylabel="bits per byte")
    panels[1].set(xlabel="seconds")
    panels[0].legend(frameon=False)
    figure.savefig(file, dpi=120, bbox_inches="tight")
    pyplot.close(figure)


def load_best(trainer) -> None:
    """Give the model the weights of the best evaluation, if those are not the last ones."""
    best = trainer.directory.folder / "best.pt"
    if best.exists():
        state = checkpoint.read(best)
        if state["step"] != trainer.progress.step:
            trainer.model.load_state_dict(state["model"])
            print0(f"what follows comes from the best weights, of step {state['step']:,}")


def summary(trainer, lines: list[dict]) -> str:
    """The result of a run as lines of `name: value`, for grep."""
    val = [line for line in lines if line["split"] == "val"]
    best = min(val, key=lambda line: line["loss"]) if val else {"bpb": math.nan, "loss": math.nan}
    speed = [line["tokens_per_s"] for line in lines if line["split"] == "train"]
    found = {
        "val_bpb": f"{best['bpb']:.4f}",
        "val_loss": f"{best['loss']:.4f}",
        "steps": trainer.progress.step,
        "tokens": trainer.progress.step * trainer.tokens_per_step,
        "seconds": round(lines[-1]["elapsed_s"]) if lines else 0,
        "tokens_per_s": round(float(np.median(speed))) if speed else 0,
        "peak_memory_mb": f"{trainer.machine.peak_memory():.0f}",
        "parameters": trainer.config.model.estimate()["parameters"],
    }
    return "\n".join(f"{name}: {value}" for name, value in found.items())


def final(trainer, name: str) -> None:
    """
    The end of a run: curve, summary next to the recipe's previous run on the same data, stories, the next
    command.
    """
    from nanostlm import generate, tasks

    c, data, progress = trainer.config, trainer.data, trainer.progress
    folder = trainer.directory.folder
    earlier = [run for run in runs.folders_of(name) if run != folder and (run / "metrics.jsonl").exists()]
    earlier = [run for run in earlier if runs.read_config(run).get("data") == trainer.fingerprint]
    metrics = {run: runs.read_metrics(run) for run in [folder, *earlier[:1]]}
    val, floor = data.meta["val"], data.meta.get("floor_bpb")
    bytes_per_token = (val["bytes"] + val["stories"]) / max(1, val["tokens"])
    plot(metrics, floor and floor * math.log(2) * bytes_per_token)
    speed = [line["tokens_per_s"] for line in metrics[folder] if line["split"] == "train"]
    seconds = metrics[folder][-1]["elapsed_s"] if metrics[folder] else 0
    tokens = progress.step * trainer.tokens_per_step
    print0(
        f"\n{progress.step:,} updates, {tokens / 1e6:.2f}M tokens = {tokens / len(data.train):.2f} epochs in "
        f"{seconds:.0f} s; {np.median(speed) if speed else 0:,.0f} tokens/s; "
        f"peak memory {trainer.machine.peak_memory():,.0f} MB"
    )
    for run, lines in metrics.items():
        if found := [line for line in lines if line["split"] == "val"]:
            best = min(found, key=lambda line: line["loss"])
            print0(
                f"best val loss {best['loss']:.4f} nats a token, {best['bpb']:.4f} bits per byte "
                f"(step {best['step']}) in {run}"
            )
    if progress.skipped:
        print0(f"{progress.skipped} updates were left out: their loss or gradient was not finite")
    load_best(trainer)
    trainer.model.eval()  # in float32: a token at a time, autocast would only cast
    if sources.corpus(data.meta["corpus"]).check:
        for line in tasks.grammar_report(trainer.model, data):
            print0(line)
    for text in generate.stories(trainer.model, data.tokenizer, c.prompt, 3, seed=c.seed):
        print0(f"\n{text}")
    print0(
        f'\ncurve: {folder / "loss.png"}\nnext:  python sample.py --out_dir {folder} --prompt "{c.prompt}"'
    )
    print(summary(trainer, metrics[folder]), flush=True)
