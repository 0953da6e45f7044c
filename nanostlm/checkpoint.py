"""
Checkpoints: save, verify, load. `load(path)` returns a model that is ready to use.

A checkpoint is a zip as torch.save writes it, of tensors and plain data only: torch.load(weights_only=True)
opens it, and nothing read from disk is ever executed. Its last 64 bytes, the zip's comment, are the SHA-256
of all before them, so any flipped bit is detected. A file is written beside its final name, synced, and then
renamed: at any time, the final name refers to a complete checkpoint, either the old or the new one.

    model, tokenizer = checkpoint.load("out/tiny")        # a run's folder, or one .pt file
"""

import hashlib
import os
import pickle
import platform
import struct
import subprocess
import zipfile
from dataclasses import asdict, fields
from pathlib import Path

import torch
from torch import nn

from experiments import architecture, name_of
from nanostlm import machine, settings
from nanostlm import tokenizer as tokenizers
from nanostlm.schema import COUNT, NAME, NONE, TEXT, TYPES, WHOLE, check, naming
from nanostlm.variants import merge_lora

FORMAT = 2  # of the dictionary inside; newer formats are rejected
TENSOR = "a tensor", lambda x: getattr(x, "is_cpu", 0) and x.layout == torch.strided and x.is_contiguous()
STATE = {  # of every checkpoint
    "model": {"*": TENSOR},
    "architecture?": NAME,
    "model_config": {},
    "tokenizer": tokenizers.STATE,
    "step?": WHOLE,
    "train_config?": {"data_dir": TEXT, "dataset": NAME, "tokenizer": NAME},
}
WEIGHTLESS = ("dropout", "label_smoothing", "z_loss", "loss_chunk", "block_size", "separator")
CODE = (  # the source files that affect the results of every run
    *("model.py", "train.py", "nanostlm/variants.py", "nanostlm/data.py", "nanostlm/machine.py"),
    *("nanostlm/optim.py", "nanostlm/score.py"),
)


def save(path: str | Path, state: dict, previous: Path | None = None) -> None:
    """
    Write `state` (tensors and plain data) to `path`, atomically; the old file is renamed to `previous`.
    Raises OSError or RuntimeError on failure, and then changes nothing.
    """
    path = Path(path)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w+b") as file:
            torch.save({"format": FORMAT, **state}, file)
            file.seek(-2, os.SEEK_END)  # the length of the zip's comment, the last field of the file
            file.write(struct.pack("<H", 64))
            file.seek(0)
            file.write(hashlib.file_digest(file, "sha256").hexdigest().encode())
            file.flush()
            os.fsync(file.fileno())
        if previous and path.exists():
            os.replace(path, previous)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """fsync a directory, so that renames in it survive a power failure (POSIX only)."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def read(path: str | Path) -> dict:
    """The dictionary in a checkpoint, on the CPU. Raises ValueError with the problem of the file."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint at {path}")
    try:
        whole = digest_holds(path)
        if not whole:  # perhaps written by another program: use the checksums of the zip
            with zipfile.ZipFile(path) as file:
                broken = file.testzip()
            if broken:
                raise ValueError(f"its part {broken} fails its checksum")
        state = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(state, dict) or "format" not in state:
            raise ValueError("it was not written by this project")
        check(state, {"format": COUNT})
        if not whole:
            raise ValueError("its checksum does not fit its content")
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path} holds more than tensors and plain data, so it was not opened") from error
    except Exception as error:  # reading a damaged zip raises many kinds of exceptions, including OSError
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path} is damaged or no checkpoint: {reason}") from error
    if state["format"] > FORMAT:
        raise ValueError(f"{path} was written by a newer version of this project")
    with naming(path):
        check(state, STATE)
        known = {f"{f.name}?": TYPES[type(f.default)] for f in fields(classes(state)[0])}
        check(state["model_config"], known | {"*": NONE}, "model_config")
        return upgrade(state)


def classes(state: dict) -> tuple[type, type[nn.Module]]:
    """The classes of configuration and model of a checkpoint; earlier versions had only GPT."""
    return architecture(state.get("architecture", "gpt"))


def upgrade(state: dict) -> dict:
    """
    Convert the dictionary of an earlier format to the current one. Format 1 had document masking among the
    training settings, the progress of a run in separate entries and, with `ema`, an average of the weights.
    """
    if state["format"] >= 2:
        return state
    settings = state.get("train_config", {})
    masked = not settings.get("cross_stories", True)
    separator = len(state["tokenizer"]["ranks"].splitlines()) if masked else -1
    state["model_config"] = state["model_config"] | {"separator": separator}
    if settings.pop("ema", 0):
        state["ema"] = True
    if "optimizers" in state:
        names = ("step", "best", "evaluated", "skipped", "elapsed")
        state["progress"] = {n: state.get(n) for n in names} | {"evals_since_best": state.get("waited")}
    return state | {"format": FORMAT}


def digest_holds(path: Path) -> bool:
    """Whether the last 64 bytes of a file are the SHA-256 of all before them."""
    size, digest = path.stat().st_size - 64, hashlib.sha256()
    with open(path, "rb") as file:
        while (left := size - file.tell()) > 0:
            digest.update(file.read(min(left, 1 << 20)))
        return file.read() == digest.hexdigest().encode()


def load(path: str | Path, device: str | torch.device = "cpu") -> tuple[nn.Module, "tokenizers.Tokenizer"]:
    """A run's folder (best.pt, else latest.pt) or one checkpoint file -> (model in eval mode, tokenizer)."""
    return build(find(path), device)[:2]


def find(path: str | Path | None = None) -> Path:
    """The checkpoint that a path stands for: itself, or the best one in a run's folder (None: the newest)."""
    settings.check_path("a run", path)
    path = newest_run() if path is None else Path(path)
    if path.is_dir():
        found = [path / name for name in ("best.pt", "latest.pt", "previous.pt") if (path / name).is_file()]
        if not found:
            raise FileNotFoundError(
                f"{path} holds no checkpoint; train one with: python train.py config/tiny.py"
            )
        return found[0]
    return path


def build(path: Path, device: str | torch.device = "cpu") -> tuple[nn.Module, "tokenizers.Tokenizer", dict]:
    """A checkpoint file -> (model in eval mode, tokenizer, what `read` returns)."""
    state = read(path)
    with naming(path):
        Config, Model = classes(state)
        config = Config(**state["model_config"])
        machine.check_memory(config, device)
        model, tokenizer = Model(config), tokenizers.from_state(state["tokenizer"])
        if tokenizer.vocab_size != model.config.vocab_size:
            raise ValueError(f"model_config.vocab_size must be the tokenizer's {tokenizer.vocab_size}")
        weights = merge_lora(state["model"], model.state_dict())
        fit(weights, model.state_dict())
    model.load_state_dict(weights)
    return model.to(device).eval(), tokenizer, state


def fit(given: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    """ValueError unless the tensors have the names, shapes and dtypes of the wanted ones."""
    for name in wanted | given:
        a, b = (f"{x[name].dtype} {list(x[name].shape)}" if name in x else "absent" for x in (given, wanted))
        if a != b:
            raise ValueError(f"the tensor {name} is {a}, and {b} in a model of this configuration")


def grown(model: nn.Module, wanted: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights of a model with a larger vocabulary: the rows of new ids are those of `wanted`."""
    known, state = model.config.vocab_size, model.state_dict()
    for name, new in wanted.items():
        if state[name].shape != new.shape:
            state[name] = torch.cat((state[name][:known], new[known:]))
    return state


def adapt(model: nn.Module, wanted, source: str) -> nn.Module:
    """
    A model with the weights of `model` and the settings of `wanted` that do not affect the weights.
    ValueError if `wanted` differs from the defaults in another setting; `source` names the model in it.
    """
    if name_of(model) != name_of(wanted):
        raise ValueError(f"{source} is a model of another kind: set architecture={name_of(model)}")
    own, default, asked = asdict(model.config), asdict(type(wanted)()), asdict(wanted)
    other = [
        f"{name}={value}"
        for name, value in asked.items()
        if value not in (own[name], default[name]) and name not in WEIGHTLESS
    ]
    if other:
        raise ValueError(f"{source} does not match {', '.join(other)}: remove these settings")
    config = settings.update(model.config, **{name: asked.get(name) for name in WEIGHTLESS})
    state = model.state_dict()
    if config.position == "learned":
        if config.block_size > model.config.block_size:
            raise ValueError(
                f"block_size={config.block_size}, but {source} has learned only "
                f"{model.config.block_size} positions"
            )
        state["embedder.positions.weight"] = state["embedder.positions.weight"][: config.block_size]
    adapted = type(model)(config)
    fit(state, adapted.state_dict())
    adapted.load_state_dict(state)
    return adapted


def newest_run(root: str | Path = "out") -> Path:
    """The folder under `root` whose checkpoint was written last."""
    files = [file for file in Path(root).glob("*/*.pt") if not file.name.endswith(".tmp")]
    if not files:
        raise FileNotFoundError(
            f"no checkpoint under {root}/; train one with: python train.py config/tiny.py"
        )
    return max(files, key=lambda file: file.stat().st_mtime).parent


def flat_settings(state: dict) -> dict:
    """The settings in a checkpoint by name, those of model and objective among them."""
    outer = state.get("train_config", {})
    parts = [part for part in outer.values() if isinstance(part, dict)] + [state["model_config"]]
    flat = {name: value for name, value in outer.items() if not isinstance(value, dict)}
    return {name: value for part in (flat, *parts) for name, value in part.items()}


def code(*names: str) -> tuple[str, ...]:
    """The source files that affect the results of a run with these experiments."""
    return (*CODE, *(f"experiments/{name}.py" for name in names if name not in ("", "gpt")))


def provenance(*names: str) -> dict[str, str]:
    """Versions, git commit (with -dirty if modified) and hashes of the source files, those of `code`."""
    here = Path(__file__).resolve().parent.parent
    made = {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "system": platform.platform(),
    }
    try:
        made["commit"] = subprocess.run(
            ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=40", "--match=-"],
            capture_output=True,
            text=True,
            check=True,
            timeout=5,
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        made["commit"] = "unknown"
    for file in code(*names):
        if (here / file).exists():
            made[file] = hashlib.sha256((here / file).read_bytes()).hexdigest()[:16]
    return made
