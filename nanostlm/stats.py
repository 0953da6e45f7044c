"""
Figures with 95% confidence intervals, and the table that evaluate.py prints.

    mean("bits per story", values)                    # of items that are independent of each other
    proportion("valid", n_valid, n)                   # Wilson's interval
    ratio("bits per byte", bits, n_bytes)             # a quotient of two sums over the same items
    print(table({"out/tiny": [("bpb", figure), ...]}))
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

Z = 1.959964  # the 97.5% quantile of the normal distribution


class Figure(NamedTuple):
    """A number with its 95% confidence interval (nan: unknown) and the number of items it comes from."""

    name: str
    value: float
    low: float
    high: float
    n: int
    percent: bool = False  # a fraction, printed in percent


@dataclass
class Result:
    """What a task returns. `items` has one dict of plain data per item, for --json."""

    figures: list[Figure]
    notes: list[str] = field(default_factory=list)  # conventions, what was omitted and why, examples
    items: list[dict] = field(default_factory=list)

    def as_dict(self, items: bool = False) -> dict:
        """Plain data for JSON, which has no nan: null takes its place."""
        found = {"figures": [figure._asdict() for figure in self.figures], "notes": self.notes}
        return without_nan(found | ({"items": self.items} if items else {}))


def without_nan(x: Any) -> Any:
    """Nested lists and dicts with None in the place of nan and infinities."""
    if isinstance(x, dict):
        return {key: without_nan(value) for key, value in x.items()}
    if isinstance(x, list | tuple):
        return [without_nan(value) for value in x]
    return None if isinstance(x, float) and not math.isfinite(x) else x


def mean(name: str, values: Sequence[float]) -> Figure:
    values = np.asarray(values, dtype=np.float64)
    n = len(values)
    value = values.mean() if n else math.nan
    margin = Z * values.std(ddof=1) / math.sqrt(n) if n > 1 else math.nan
    return Figure(name, float(value), float(value - margin), float(value + margin), n)


def proportion(name: str, successes: float, n: int) -> Figure:
    """Wilson's score interval, which also holds for 0 and for n successes."""
    if not n:
        return Figure(name, math.nan, math.nan, math.nan, 0, percent=True)
    p, z2 = successes / n, Z * Z / n
    center, margin = p + z2 / 2, Z * math.sqrt(p * (1 - p) / n + z2 / (4 * n))
    low, high = max(0.0, (center - margin) / (1 + z2)), min(1.0, (center + margin) / (1 + z2))
    return Figure(name, p, low, high, n, percent=True)


def ratio(name: str, over: Sequence[float], under: Sequence[float]) -> Figure:
    """sum(over) / sum(under) of the same items, with the interval of the ratio estimator (delta method)."""
    over, under = (np.asarray(x, dtype=np.float64) for x in (over, under))
    n, total = len(over), under.sum()
    value = over.sum() / total if total else math.nan
    if n < 2 or not total:
        return Figure(name, float(value), math.nan, math.nan, n)
    margin = Z * math.sqrt(n / (n - 1) * ((over - value * under) ** 2).sum()) / total
    return Figure(name, float(value), float(value - margin), float(value + margin), n)


def stratified(name: str, groups: Sequence[Sequence[float]]) -> Figure:
    """The mean of the means of groups of independent items, for fractions such as accuracies."""
    groups = [np.asarray(values, dtype=np.float64) for values in groups if len(values)]
    k, n = len(groups), sum(map(len, groups))
    if not k:
        return Figure(name, math.nan, math.nan, math.nan, 0, percent=True)
    value = sum(x.mean() for x in groups) / k
    pooled = np.concatenate(groups).var()  # in place of the variance of a single item
    variance = sum(x.var(ddof=1) / len(x) if len(x) > 1 else pooled for x in groups)
    margin = Z * math.sqrt(variance) / k
    low, high = (float(np.clip(x, 0, 1)) for x in (value - margin, value + margin))
    return Figure(name, float(value), low, high, n, percent=True)


def transform(name: str, figure: Figure, f: Callable[[float], float]) -> Figure:
    """An increasing function of a figure, such as the perplexity exp(nats per token)."""
    return Figure(name, *map(f, (figure.value, figure.low, figure.high)), figure.n)


def table(columns: dict[str, list[tuple[str, Figure]]]) -> str:
    """
    One row per figure. `columns` maps the name of each model to pairs (task, figure). A single model has a
    column each for value, interval and items; several have a column each.
    """
    cells = {(task, figure.name): {} for pairs in columns.values() for task, figure in pairs}
    for model, pairs in columns.items():
        for task, figure in pairs:
            cells[task, figure.name][model] = figure
    if len(columns) == 1:
        rows = [["task", "figure", "value", "95% interval", "items"]]
        for key, found in cells.items():
            [f] = found.values()
            rows.append([*key, digits(f.value, f.percent), interval(f), f"{f.n:,}"])
    else:
        rows = [["task", "figure", *columns]]
        for key, found in cells.items():
            shown = {m: f"{digits(f.value, f.percent)} ({interval(f)}; {f.n:,})" for m, f in found.items()}
            rows.append([*key, *(shown.get(model, "-") for model in columns)])
    width = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    pad = [str.ljust, str.ljust, *[str.rjust] * len(rows[0])]
    return "\n".join(
        "  ".join(p(cell, w) for p, cell, w in zip(pad, row, width, strict=False)).rstrip() for row in rows
    )


def digits(x: float, percent: bool = False) -> str:
    if math.isnan(x):
        return "-"
    return f"{x:.1%}" if percent else f"{x:,.4f}" if abs(x) < 100 else f"{x:,.1f}"


def interval(figure: Figure) -> str:
    if math.isnan(figure.low):
        return "-"
    return f"{digits(figure.low, figure.percent)} to {digits(figure.high, figure.percent)}"
