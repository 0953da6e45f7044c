"""
Wrong names and pronouns: where a sentence of a toystory names a child of an earlier sentence, or says he or
she, how often does a model prefer another of the twelve names, or the other pronoun?

    python bench/references.py out/thoughts out/patches [--stories 200]

Each story's first such name and first such pronoun count, if no word of the same sentence before it tells.
The model scores every candidate in its place, with the next word, after the whole text before it; it is wrong
if the likeliest is not the story's own.
"""

import re
from itertools import pairwise

import common

from nanostlm import checkpoint, score, stats, tasks
from nanostlm.data import load_data

NAMES = "Lily Mia Anna Sue Emma Lucy Tom Ben Tim Max Leo Jack".split()
KINDS = {"names": NAMES, "pronouns": ["he", "she"]}
CLUES = {*NAMES, *"he she him her his himself herself boy girl mom dad grandma grandpa".split()}


def references(text: str) -> dict[str, tuple[str, str, str]]:
    """{kind: (the text before the word, the word, the next word)}, where a story has one."""
    found, known = {}, set()
    for sentence in re.finditer(r"\S.*?(?:[.!?][\"']?(?=\s)|$)", text, re.S):
        words = list(re.finditer(r"[\w']+", sentence[0]))
        for word, after in pairwise(words):
            kind = "names" if word[0] in known else "pronouns" if word[0] in KINDS["pronouns"] else None
            if kind and known and word.start():
                found.setdefault(kind, (text[: sentence.start() + word.start()], word[0], after[0]))
            if {word[0], word[0].lower()} & CLUES:
                break
        known |= {word[0] for word in words} & {*NAMES}
    return found


def wrong(model, tokenizer, cases: list[tuple[str, str, str]], candidates: list[str]) -> list[bool]:
    """Of each case, whether another candidate is likelier than the right one."""
    pairs = []
    for before, _, after in cases:
        prefix = [tokenizer.eot, *tokenizer.encode(before.rstrip())]
        blank = before[len(before.rstrip()) :]
        pairs += [(prefix, tokenizer.encode(f"{blank}{word} {after}")) for word in candidates]
    logp = score.loglikelihoods(model, pairs, progress="references")[0].reshape(len(cases), len(candidates))
    return [candidates[best] != word for best, (_, word, _) in zip(logp.argmax(axis=1), cases, strict=True)]


def main(argv: list[str] | None = None) -> None:
    parser = common.parser(__doc__, repeats=0)
    parser.add_argument("runs", nargs="+", help="runs or checkpoints, of models of toystories")
    parser.add_argument("--data", default="data/toystories/byte", help="the stories; default %(default)s")
    parser.add_argument("--stories", type=int, default=200, help="validation stories; default %(default)s")
    options = common.parse(parser, argv)
    found = [references(text) for text in tasks.validation_texts(load_data(options.data))[: options.stories]]
    cases = {kind: [story[kind] for story in found if kind in story] for kind in KINDS}
    rows, results = [], {}
    for run in options.runs:
        model, tokenizer = checkpoint.load(run)
        for kind, of_kind in cases.items():
            errors = wrong(model, tokenizer, of_kind, KINDS[kind])
            figure = stats.proportion(f"wrong {kind}", sum(errors), len(errors))
            results[f"{run}: {figure.name}"] = figure.value
            rows.append(
                [run, figure.name, f"{figure.value:.1%}", f"{figure.low:.1%} to {figure.high:.1%}", figure.n]
            )
    common.table(["run", "figure", "value", "95% interval", "cases"], rows)
    common.finish("references", wrong=results)


if __name__ == "__main__":
    main()
