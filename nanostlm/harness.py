"""
EleutherAI's lm-evaluation-harness (arXiv 2405.14782), over any model with our interface.

    result = run(subject, ["arc_easy", "tests/lm_eval_tasks/arc.yaml"])   # stats.Result
    lm = adapter_class()(model, tokenizer)                                # for lm_eval.evaluate(lm, ...)

A name is a task, group or tag that the harness knows, whose data come from the Hugging Face Hub, or a local
YAML file, or a folder of them. In a local file, `data_files` are relative to the folder of the file.

Conventions:
- End-of-text comes before every context, as our models were trained: HFLM's `add_bos_token=True`.
- A context and a continuation that exceed the window lose the beginning of the context, as in HFLM. A
  continuation longer than the window, which HFLM refuses, is scored as in score.loglikelihood.
- A document's rolling likelihood is that of score.score: end-of-text, then disjoint windows of block_size
  tokens. HFLM with `add_bos_token=False` gives the same for a document of one window. For a longer one, HFLM
  moves the last window back until it is full, so that its tokens see more. With `add_bos_token=True`, HFLM
  also counts the likelihood of end-of-text after end-of-text.
- Generation is greedy unless the task samples. A context keeps its last block_size - 1 - max_gen_toks tokens,
  but at least half a window. HFLM refuses tasks whose max_gen_toks fill the window.
- Of equally likely choices, the harness takes the first. A model that prefers nothing is then right where the
  first choice is gold.
"""

import contextlib
import functools
import io
import json
import logging
import math
import os
import random
import sys
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from nanostlm import generate, score, settings, stats
from nanostlm.schema import naming
from nanostlm.tokenizer import Unreachable, within

WEIGHTED = {  # metrics of pairs (log-likelihood, words or bytes), from nats per word or byte
    "bits_per_byte": lambda nats: nats / math.log(2),
    "byte_perplexity": math.exp,
    "word_perplexity": math.exp,
}
SHARES = ("acc", "acc_norm", "exact_match")  # metrics printed in percent
SAMPLING = {name: off for name, (_, off) in generate.SAMPLERS.items()}  # each sampler turned off
SEED = 1234  # of few-shot examples, the harness' default


@functools.cache
def adapter_class() -> type:
    """The class Adapter(model, tokenizer, rows=16). ValueError if lm_eval is not installed."""
    if not find_spec("lm_eval"):
        raise ValueError("lm_eval is not installed: pip install -r requirements-eval.txt")
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import normalize_gen_kwargs

    class Adapter(TemplateLM):
        """Our model as the harness sees it; `rows` windows per batch."""

        def __init__(self, model, tokenizer, rows: int = 16):
            super().__init__()
            self.model, self.tokenizer, self.rows, self.stderr = model, tokenizer, rows, sys.stderr

        @property
        def eot_token_id(self) -> int:
            return self.tokenizer.eot

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_) -> list[int]:
            ids = self.tokenizer.encode(string)
            return ids if add_special_tokens is False else [self.tokenizer.eot, *ids]

        def loglikelihood(self, requests, disable_tqdm: bool = True) -> list[tuple[float, bool]]:
            return super().loglikelihood(requests, disable_tqdm=True)  # our progress bar is enough

        def _loglikelihood_tokens(self, requests, **_) -> list[tuple[float, bool]]:
            T, pairs = self.model.config.block_size, []
            for (context, continuation), prefix, ids in requests:
                if not ids:
                    message = "has no token of its own after the context"
                    raise ValueError(f"the continuation {continuation!r:.40} {message} {context[-40:]!r}")
                pairs.append((prefix[-(T + 1 - len(ids)) :] if len(ids) <= T else prefix, ids))
            with contextlib.redirect_stderr(self.stderr):
                found = score.loglikelihoods(
                    self.model, pairs, rows=self.rows, greedy=True, progress="lm_eval"
                )
            return list(zip(*(values.tolist() for values in found), strict=True))

        def loglikelihood_rolling(self, requests, disable_tqdm: bool = True) -> list[float]:
            texts = [self.tokenizer.encode(request.args[0]) for request in requests]
            with contextlib.redirect_stderr(self.stderr):
                options = dict(rows=self.rows, progress="lm_eval")
                nats = score.score(self.model, texts, self.tokenizer.eot, **options)
            return [-float(text.sum(dtype=np.float64)) for text in nats]

        def generate_until(self, requests, disable_tqdm: bool = True) -> list[str]:
            texts, prompts, alike = [""] * len(requests), [], {}
            for i, request in enumerate(requests):
                prompts.append(self.tokenizer.encode(request.args[0]))
                alike.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(i)
            for key, members in alike.items():  # requests with the same settings
                options = normalize_gen_kwargs(json.loads(key))
                until, n_new = [text for text in options.pop("until") if text], options.pop("max_gen_toks")
                options |= {} if options.pop("do_sample") else {"temperature": 0}
                samplers = generate.chain(**SAMPLING | options)
                stops = [generate.stop_string(self.tokenizer, text) for text in until]
                T = self.model.config.block_size
                keep = max(1, T - 1 - min(n_new, T // 2))
                members.sort(key=lambda i: len(prompts[i]))
                for start in range(0, len(members), self.rows):
                    batch = members[start : start + self.rows]
                    new_ids = generate.generate(
                        self.model,
                        [prompts[i][-keep:] for i in batch],
                        n_new,
                        samplers,
                        eot=self.tokenizer.eot,
                        seed=SEED + start,
                        stops=stops,
                    )
                    for i, ids in zip(batch, new_ids, strict=True):
                        texts[i] = self.tokenizer.decode(ids)
                        for stop in until:
                            texts[i] = texts[i].partition(stop)[0]
            return texts

    return Adapter


# ----------------------------------------------------------------------------------------------------------
# Tasks


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Inside, the harness and its libraries print nothing. The adapter's progress bars still do."""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(disabled)


@contextlib.contextmanager
def offline() -> Iterator[None]:
    """Inside, datasets come from local files and caches; a missing one raises OSError at once."""
    import datasets
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before


@functools.cache
def manager(include_path: str | None = None):
    """The harness' index of its own tasks, which takes 10 seconds, and of those in `include_path`."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=include_path)


def build(name: str, include_path: str | None) -> dict:
    """What lm_eval's TaskManager.load returns for one name, with tasks and groups."""
    from lm_eval.tasks import TaskManager

    path = Path(name).expanduser().resolve()
    if path.suffix not in (".yaml", ".yml") and not path.is_dir():
        known = manager(include_path)
        if name not in known.task_index:
            raise ValueError(f"lm_eval has no task {name!r:.80}{settings.closest(name, known.all_tasks)}")
        with naming(f"lm_eval:{name}"):
            return known.load([name])
    if not path.exists():
        raise FileNotFoundError(f"there is no file {name}")
    folder = path if path.is_dir() else path.parent
    with naming(name), contextlib.chdir(folder):
        local = TaskManager(include_path=folder, include_defaults=False)
        names = local.all_subtasks if path.is_dir() else [str(path)]
        if not names:
            raise ValueError("no task in this folder")
        return local.load(names)


def load(names: Sequence[str], include_path: str | None = None) -> dict:
    """
    The tasks and groups of all names. ValueError or FileNotFoundError for an unknown task or an invalid file;
    Unreachable, within seconds, for data that are not cached while the Hub does not answer.
    """
    from huggingface_hub import constants

    tasks, groups = {}, {}
    for name in names:
        try:
            with offline():
                found = build(name, include_path)
        except FileNotFoundError:
            raise
        except OSError:
            advice = "run the task where it can be reached, or give a local file (lm_eval:FILE.yaml)"
            if constants.HF_HUB_OFFLINE:
                message = f"HF_HUB_OFFLINE is set, and the data of lm_eval:{name} are not in the cache"
                raise Unreachable(f"{message}: unset it, {advice}") from None
            try:
                within(3, lambda: answers(constants.ENDPOINT))
            except Exception as error:
                message = f"cannot load lm_eval:{name}: the Hugging Face Hub cannot be reached at"
                reason = f"{constants.ENDPOINT} ({type(error).__name__})"
                raise Unreachable(f"{message} {reason}: {advice}") from None
            found = build(name, include_path)
        if twice := tasks.keys() & found["tasks"].keys():
            raise ValueError(f"lm_eval:{name} repeats the task {min(twice)}: leave one of them out")
        tasks |= found["tasks"]
        groups |= found.get("groups", {})
    return {"tasks": tasks, "groups": groups}


def answers(url: str) -> None:
    """OSError unless the server answers, with whatever status."""
    from urllib.error import HTTPError
    from urllib.request import Request, urlopen  # supports proxies

    with contextlib.suppress(HTTPError):
        urlopen(Request(url, method="HEAD"), timeout=3).close()


# ----------------------------------------------------------------------------------------------------------
# Results


def run(
    subject,
    names: str | Sequence[str],
    *,
    include_path: str | None = None,
    limit: int | None = None,
    rows: int = 16,
    log_samples: bool = False,
) -> stats.Result:
    """
    Every metric of the tasks and groups `names` (or one name), on the first `limit` items of each task.
    `subject` has a model and a tokenizer; `include_path` is one more folder of tasks known by name. With
    log_samples, the items also have their documents, requests and responses. Errors are those of `load`.
    """
    lm = adapter_class()(subject.model, subject.tokenizer, rows)
    from lm_eval import evaluator

    with quiet():
        random.seed(0)  # as the harness' own simple_evaluate: some tasks shuffle their choices
        np.random.seed(SEED)
        tasks = load([names] if isinstance(names, str) else names, include_path)
        for task in tasks["tasks"].values():
            task.set_fewshot_seed(SEED)
        os.environ.setdefault("DISABLE_MULTIPROC", "1")  # bootstrap in this process
        found = evaluator.evaluate(lm, tasks, limit=limit, bootstrap_iters=1000)
    shots = sorted({n or 0 for n in found["n-shot"].values()})
    conventions = [
        "end-of-text before every context; contexts beyond the window lose their beginning; "
        f"examples before each item: {' or '.join(map(str, shots))}",
        "of equally likely choices, the harness takes the first",
    ]
    samples = [(task, sample) for task, each in found["samples"].items() for sample in each]
    items = [item(task, sample, log_samples) for task, sample in samples]
    return stats.Result(figures(found), conventions, items)


def figures(found: dict) -> list[stats.Figure]:
    """
    A figure for each metric, task or group, and filter in what lm_eval.evaluate returns. Groups come after
    their tasks: their metrics are in percent where those of the tasks are.
    """
    result, shares = [], set()
    for task, metrics in found["results"].items():
        for key, value in metrics.items():
            metric, comma, kind = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            samples = [s for s in found["samples"].get(task, ()) if s["filter"] == kind and metric in s]
            name = f"{task} {metric}" + f" ({kind})" * (kind != "none")
            n, stderr = len(samples) or metrics["sample_len"], metrics[f"{metric}_stderr,{kind}"]
            new = figure(name, metric, float(value), stderr, [s[metric] for s in samples], n)
            shares |= {metric} if new.percent else set()
            result.append(new._replace(percent=metric in shares))
    return result


def figure(name: str, metric: str, value: float, stderr, values: list, n: int) -> stats.Figure:
    """With Wilson's interval for a share of items, or the ratio's per byte or word; else from `stderr`."""
    if metric in WEIGHTED and values and isinstance(values[0], tuple):
        logp, weights = zip(*values, strict=True)
        return stats.transform(name, stats.ratio(name, [-x for x in logp], weights), WEIGHTED[metric])
    share = values and all(isinstance(x, int | float) and x in (0, 1) for x in values)
    if share and math.isclose(value, sum(values) / n):
        return stats.proportion(name, sum(values), n)
    margin = stats.Z * stderr if isinstance(stderr, float) else math.nan
    return stats.Figure(name, value, value - margin, value + margin, n, percent=metric in SHARES)


def item(task: str, sample: dict, whole: bool) -> dict:
    """The plain data of one item."""
    kept = {"task": task} | {key: sample[key] for key in ("doc_id", "filter", *sample["metrics"])}
    if whole:
        kept |= {key: sample[key] for key in ("doc", "arguments", "resps", "target")}
    return json.loads(json.dumps(kept, default=str))
