"""A built-in corpus of children's stories with known entropy, and a checker for it.

A probabilistic grammar generates short stories in the style of TinyStories: any number of them, each with
the exact log-probability of its choices. The entropy of the corpus is therefore known, and a model's distance
to it can be measured. `check` parses any text: it returns the text's log-probability, or the first rule of
the grammar that the text breaks. The grammar is data, in toystories.txt, which also explains its notation.

    python -m nanostlm.toystories -n 3 --seed 1          # three stories on stdout, their bits on stderr
    python -m nanostlm.toystories --check FILE           # a verdict on each story of a file ("-" is stdin)

    for text, logprob in stories(seed=0): ...   # endless; story i depends only on (seed, i)
    check(text)                                 # Verdict(ok, logprob, rule, detail, at)
"""

import functools
import math
import os
import random
import re
import sys
from bisect import bisect
from collections.abc import Iterator
from itertools import accumulate, count, islice
from pathlib import Path
from typing import NamedTuple

VERSION = "5"
TEXT = Path(__file__).with_suffix(".txt").read_text(encoding="utf-8")

# Required rules, and the message of check() if one is missing
REQUIRED = {
    "found": "lost object never found",
    "mended": "broken thing never mended",
    "sorry": "quarrel never made up",
}
# A wrong word from one of these columns is a "wrong pronoun"
PRONOUNS = ["girl", "he", "him", "his", "himself"]


# ------------------------------------------------------------------------------------------------------------
# The grammar, compiled into operations: a literal str, or one of these three


class Ref(NamedTuple):
    """Write column `column` of the row in variable `var`."""

    var: int
    column: int


class Choice(NamedTuple):
    """Expand one of the alternatives; each is a tuple of operations."""

    alternatives: tuple
    logprobs: tuple
    cumulative: tuple  # cumulative probabilities, without the last one, which is 1
    rule: str


class Draw(NamedTuple):
    """Draw a row that no rival holds, store it in variable `var`, and write its column `column`."""

    var: int
    column: int
    source: tuple | Ref  # the rows, or the column of another variable's row that has them
    rivals: tuple  # the other variables that are drawn from the same list


class Grammar:
    """The compiled text of a grammar.

    A row is a tuple: name, name with its article, the other columns, then all of these with a capital letter.
    """

    def __init__(self, text: str):
        text = re.sub(r"^#.*\n", "", text, flags=re.M)
        blocks = re.findall(r"^(\w+), (\w+):(.*)\n((?: .*\n|\n)+)", text, re.M)
        self.columns = ["", "a", *dict.fromkeys(" ".join(header for _, _, header, _ in blocks).split())]
        self.lists = {name: tuple(self._rows(header.split(), body)) for name, _, header, body in blocks}
        self.kinds = {name: kind for name, kind, _, _ in blocks}
        self.texts = dict(re.findall(r"^(\w+):((?:.*\n)(?: .*\n|\n)*)", text, re.M))
        draws = [(var.lower(), source) for var, source in re.findall(r"<(?:\w+ )?(\w+)=([\w.]+)>", text)]
        self.variables = list(dict.fromkeys(var for var, _ in draws))
        self.sources = {
            var: list(dict.fromkeys(source for v, source in draws if v == var)) for var in self.variables
        }
        self.rules = {}
        self.start = self.rule("story")

    def _rows(self, header, body):
        for line in re.sub(r"\n\s*;", " ;", re.sub(r",\s*\n", ",", body)).strip().splitlines():
            names, *values = (cell.strip() for cell in line.split(";"))
            for name in re.split(r",\s*", names):
                yield self._row(name, dict(zip(header, values, strict=True)))

    def _row(self, name, values):
        cells = [name, _with_article(name), *map(values.get, self.columns[2:])]
        cells += [cell and _capitalized(cell) for cell in cells]
        return tuple(
            tuple(self._row(option, {}) for option in re.split(r",\s*", cell))
            if cell and "," in cell
            else cell
            for cell in cells
        )

    def rule(self, name: str) -> Choice:
        if name not in self.rules:
            text = re.sub(r" *¶ *", "\n", " ".join(self.texts[name].split()))
            tokens = re.findall(r"[][|]|<[^>]*>|\{[^}]*\}|[^][|<{]+", text)
            self.rules[name] = self._choice(iter([*tokens, "]"]), name)
        return self.rules[name]

    def _choice(self, tokens, rule=""):
        """The choice between the alternatives before the closing bracket."""
        alternatives, weights = [[]], [1]
        for token in tokens:
            if token == "]":
                break
            if token == "|":
                alternatives.append([])
                weights.append(1)
            elif token == "[":
                alternatives[-1].append(self._choice(tokens))
            elif token[0] in "<{":
                alternatives[-1].append(self._operation(token))
            else:
                if not alternatives[-1]:
                    weight, token = re.fullmatch(r" ?(?:\((\d+)\) ?)?(.*)", token, re.S).groups()
                    weights[-1] = int(weight or 1)
                alternatives[-1].append(token)
        for ops in alternatives:
            if ops and isinstance(ops[-1], str):
                ops[-1] = ops[-1].removesuffix(" ")
        probs = [weight / sum(weights) for weight in weights]
        return Choice(
            tuple(map(_joined, alternatives)),
            tuple(map(math.log, probs)),
            tuple(accumulate(probs))[:-1],
            rule,
        )

    def _operation(self, token):
        match = re.fullmatch(r"[<{](?:(\w+) )?([\w.]+)(?:=([\w.]+))?[>}]", token)
        if not match:
            raise ValueError(f"the grammar has no such notation: {token}")
        article, name, source = match.groups()
        column = self.columns.index((article or "").lower())
        if token[1].isupper():
            column, name = column + len(self.columns), name[0].lower() + name[1:]
        if token[0] == "{":
            return self._ref(name, column)
        if source:
            rivals = tuple(
                i for i, other in enumerate(self.variables) if other != name and source in self.sources[other]
            )
            rows = self.lists[source] if source in self.lists else self._ref(source)
            return Draw(self.variables.index(name), column, rows, rivals)
        if "." in name:  # stored in one more variable, which nothing refers to
            return Draw(len(self.variables), column, self._ref(name), ())
        alternatives = self.rule(name).alternatives
        if article:
            alternatives = tuple((_with_article(ops[0]), *ops[1:]) for ops in alternatives)
        if token[1].isupper():
            alternatives = tuple((_capitalized(ops[0]), *ops[1:]) for ops in alternatives)
        return self.rule(name)._replace(alternatives=alternatives)

    def _ref(self, name, column=0):
        var, _, attribute = name.partition(".")
        if var not in self.variables:
            var, attribute = "hero", var
        return Ref(self.variables.index(var), column + (self.columns.index(attribute) if attribute else 0))


def _with_article(text):
    return ("an " if re.match(r"(?!uni|use|one)[aeiou]|hour|hones", text) else "a ") + text


def _capitalized(text):
    return text[0].upper() + text[1:]


def _joined(ops):
    """Move a space beside an optional part of a sentence into that part, and join neighboring texts."""
    ops = [*ops]
    for i, op in enumerate(ops):
        if isinstance(op, Choice) and () in op.alternatives:
            before = after = ""
            if i and isinstance(ops[i - 1], str) and ops[i - 1].endswith(" "):
                before, ops[i - 1] = " ", ops[i - 1][:-1]
            elif i + 1 < len(ops) and isinstance(ops[i + 1], str) and ops[i + 1].startswith(" "):
                after, ops[i + 1] = " ", ops[i + 1][1:]
            full = (_joined([before, *inner, after]) if inner else () for inner in op.alternatives)
            ops[i] = op._replace(alternatives=tuple(full))
    joined = []
    for op in ops:
        if isinstance(op, str) and joined and isinstance(joined[-1], str):
            joined[-1] += op
        elif op != "":
            joined.append(op)
    return tuple(joined)


GRAMMAR = Grammar(TEXT)


# ------------------------------------------------------------------------------------------------------------
# Generating stories

LOG = [0.0, *(-math.log(n) for n in range(1, 1000))]  # the log-probability of one row out of n


def stories(seed: int, start: int = 0) -> Iterator[tuple[str, float]]:
    """Stories start, start + 1, ... of a seed, without end, each with its log-probability in nats."""
    rng = random.Random()
    for i in count(start):
        rng.seed(f"{seed} {i}")  # a str is hashed, in the same way by every version of Python
        memory, texts, logprobs = [None] * (len(GRAMMAR.variables) + 1), [], []
        expand((GRAMMAR.start,), memory, texts.append, logprobs.append, rng.random)
        yield "".join(texts), math.fsum(logprobs)


def expand(ops, memory, emit, add_logprob, uniform):
    """Expand operations: emit() each piece of text, and add_logprob() of each random choice.

    `memory` has the row that each variable holds; uniform() returns a random number in [0, 1).
    """
    for op in ops:
        kind = type(op)
        if kind is str:
            emit(op)
        elif kind is Ref:
            emit(memory[op.var][op.column])
        elif kind is Choice:
            i = bisect(op.cumulative, uniform())
            add_logprob(op.logprobs[i])
            expand(op.alternatives[i], memory, emit, add_logprob, uniform)
        else:
            rows = _candidates(op, memory)
            add_logprob(LOG[len(rows)])
            row = memory[op.var] = rows[int(uniform() * len(rows))]
            emit(row[op.column])


def _candidates(draw, memory):
    """The rows that no rival holds."""
    source = draw.source
    rows = memory[source.var][source.column] if type(source) is Ref else source
    held = [memory[rival] for rival in draw.rivals if memory[rival]]
    return [row for row in rows if row not in held] if held else rows


# ------------------------------------------------------------------------------------------------------------
# Checking stories: a parser with backtracking


class Verdict(NamedTuple):
    ok: bool
    logprob: float | None  # of the derivation, in nats; None if not ok
    rule: str | None  # the first broken rule; None if ok
    detail: str  # the position of the error, the text found there, and the text expected
    at: int | None = None  # the first character that no story has here; None if ok, or if line breaks differ


class Miss(NamedTuple):
    """The position where a derivation failed, and how the parser can continue after the error."""

    reach: int  # the text matches up to here
    start: int  # `expected` should begin here
    expected: str
    rule: str | None = None  # the rule that is broken if the parser skips the error; None if it cannot
    end: int = 0  # the position after the skipped error
    thread: tuple | None = None
    known: bool = False  # the word is in the grammar, but does not fit here


def check(text: str) -> Verdict:
    """Whether the grammar generates this story: its log-probability, or the first rule that it breaks."""
    for logprobs in derivations(text.strip()):
        return Verdict(True, math.fsum(logprobs), None, "")
    at = [match.start() for match in re.finditer(r"\S|(?<=\S)\s+(?=\S)", text)]  # of the characters left
    at, text = [*at, len(text), None], " ".join(text.split())
    rule, miss, furthest = _diagnose(text)
    found = text[miss.start : max(miss.reach, miss.start + len(miss.expected)) + 10]
    detail = f"at {miss.start}: {found!r}, expected {miss.expected!r}"
    return Verdict(False, None, rule, detail, at[furthest])


def derivations(text: str) -> Iterator[list[float]]:
    """Every derivation of this text, as the log-probabilities of its choices: there is one, or none."""
    for _, _, _, linked in _parse(text, [_initial_thread()]):
        logprobs = []
        while linked:
            logprob, linked = linked
            logprobs.append(logprob)
        yield logprobs[::-1]


def _initial_thread():
    return 0, ((GRAMMAR.start,), 0, None), (None,) * (len(GRAMMAR.variables) + 1), None


def _parse(text, threads, misses=None, steps=20_000):
    """Follow each thread through all choices, and yield the threads that end with the text.

    A thread is (position, stack, memory, linked list of log-probabilities); the stack holds the operations
    that are still to be expanded. With a list `misses`, every failure is appended to it, and line breaks are
    compared as spaces.
    """
    while threads and steps:
        steps -= 1
        at, stack, memory, logprobs = threads.pop()
        while stack:  # until this thread forks, fails or ends
            ops, i, after = stack
            if i == len(ops):
                stack = after
                continue
            op, stack = ops[i], (ops, i + 1, after)
            kind = type(op)
            if kind is Choice:
                if misses is not None and op.rule in REQUIRED:
                    resumed = at - text.startswith(" ", at - 1), stack, memory, logprobs
                    misses.append(Miss(at, at, f"<{op.rule}>", REQUIRED[op.rule], at, resumed))
                for ops, logprob in zip(op.alternatives, op.logprobs, strict=True):
                    first = ops[0] if ops and type(ops[0]) is str else ""
                    if misses is not None:
                        first = first.replace("\n", " ")
                    if text.startswith(first, at):
                        threads.append((at, (ops, 0, stack), memory, (logprob, logprobs)))
                    elif misses is not None:
                        misses.append(Miss(_reach(text, at, first), at, first))
                break
            if kind is Draw:
                rows = _candidates(op, memory)
                for row in rows:
                    if text.startswith(row[op.column], at):
                        updated = *memory[: op.var], row, *memory[op.var + 1 :]
                        threads.append((at + len(row[op.column]), stack, updated, (LOG[len(rows)], logprobs)))
                    elif misses is not None:
                        misses.append(Miss(_reach(text, at, row[op.column]), at, row[op.column]))
                break
            expected = op if kind is str else memory[op.var][op.column]
            if misses is not None:
                expected = expected.replace("\n", " ")
            if not text.startswith(expected, at):
                if misses is not None:
                    miss = Miss(_reach(text, at, expected), at, expected)
                    words, rule = _substitutes(op, expected.count(" ")) if kind is Ref else (None, None)
                    if words and (found := words.match(text, at)):
                        resumed = found.end(), stack, memory, logprobs
                        miss = miss._replace(rule=rule, end=found.end(), thread=resumed, known=bool(found[1]))
                    misses.append(miss)
                break
            at += len(expected)
        else:
            if at == len(text):
                yield at, stack, memory, logprobs
            elif misses is not None:
                misses.append(Miss(at, at, "the end"))


def _reach(text, at, expected):
    """The position up to which the text agrees with `expected`, which should begin at `at`."""
    return at + len(os.path.commonprefix([text[at : at + len(expected)], expected]))


def _possible_rows(source):
    """The rows of a list, or of a column of what another variable holds, each with the kind of its list."""
    var, _, column = source.partition(".")
    if not column:
        return [(row, GRAMMAR.kinds[source]) for row in GRAMMAR.lists[source]]
    at = GRAMMAR.columns.index(column)
    outer = [found for other in GRAMMAR.sources[var] for found in _possible_rows(other)]
    return [(option, kind) for row, kind in outer for option in row[at] or ()]


@functools.cache
def _substitutes(ref, spaces):
    """A pattern for words that may replace a stored word, and the rule that this breaks.

    Group 1 matches a word from another row of the same lists; otherwise the pattern matches any words.
    """
    drawn = [
        found for source in GRAMMAR.sources[GRAMMAR.variables[ref.var]] for found in _possible_rows(source)
    ]
    words, kind = {row[ref.column] for row, _ in drawn}, drawn[0][1]
    if GRAMMAR.columns[ref.column % len(GRAMMAR.columns)] in PRONOUNS:
        kind = "pronoun"
    known = "|".join(map(re.escape, sorted(filter(None, words), key=len, reverse=True)))
    return re.compile(rf"({known})\b|\w+" + r" \w+" * spaces), f"wrong {kind}"


def _diagnose(text):
    """The first broken rule, the miss that shows it, and the furthest position that any derivation reaches.

    Near this position, skip one wrong word, or one of the REQUIRED rules: if the text then parses well beyond
    it, that was the error. If only line breaks differ, the position is -1: they are compared as spaces.
    """
    misses = []
    for _ in _parse(text, [_initial_thread()], misses):
        return "not of the grammar", Miss(0, 0, "other line breaks"), -1
    furthest = max(misses, key=lambda miss: miss.reach)
    if furthest.reach == len(text):
        return "unfinished", furthest, furthest.reach
    best, error = (0,), None
    for miss in misses:
        if miss.thread and miss.start >= furthest.reach - 60:
            later = []
            complete = any(True for _ in _parse(text, [miss.thread], later))
            reach = len(text) if complete else max((other.reach for other in later), default=0)
            merit = reach, miss.known, miss.start
            if merit > best and (complete or reach >= max(miss.end, furthest.reach) + 20):
                best, error = merit, miss
    rule, shown = (error.rule, error) if error else ("not of the grammar", furthest)
    return rule, shown, furthest.reach


# ------------------------------------------------------------------------------------------------------------
# The command line


def check_file(path: str) -> int:
    """Print the verdict on each story of a file, and how many are valid. Returns 1 if any is not."""
    try:
        text = sys.stdin.read() if path == "-" else Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read {path}: {error}") from None
    separator = r"^(?:<\|endoftext\|>|-{3,})\s*$"
    texts = re.split(separator if re.search(separator, text, re.M) else r"\n\s*\n", text, flags=re.M)
    verdicts = [check(text) for text in texts if text.strip()]
    for number, (ok, logprob, rule, detail, _) in enumerate(verdicts, 1):
        print(f"{number}: ok, {-logprob / math.log(2):.1f} bits" if ok else f"{number}: {rule}, {detail}")
    valid = sum(verdict.ok for verdict in verdicts)
    print(f"{valid} of {len(verdicts)} stories are valid", file=sys.stderr)
    return int(valid < len(verdicts))


def main(argv: list[str]) -> int:
    from nanostlm.settings import Parser

    parser = Parser(prog="python -m nanostlm.toystories", description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("-n", type=int, default=1, help="number of stories to generate (%(default)s)")
    add("--seed", type=int, default=0, help="a different seed gives different stories (%(default)s)")
    add("--start", type=int, default=0, help="number of the first story (%(default)s)")
    add(
        "--check",
        metavar="FILE",
        help="check the stories of FILE, or of stdin (-), instead; they are separated by lines "
        "of <|endoftext|> or of dashes, or else by blank lines",
    )
    options = parser.parse_args(argv)
    if options.check:
        return check_file(options.check)
    for text, logprob in islice(stories(options.seed, options.start), options.n):
        print(text, end="\n\n", flush=True)
        print(f"[{-logprob / math.log(2):.1f} bits]", file=sys.stderr)
    return 0


if __name__ == "__main__":
    from nanostlm.entry import script

    sys.exit(script(main)())
