"""
Fill in the middle: the model also writes what is missing in a text (arXiv 2207.14255, Bavarian et al. 2022).

    python train.py config/tiny.py --objective=fim
    python sample.py out/tiny --prefix "One day, a" --suffix " sang a song."
    python experiments/fim.py out/tiny         # nats of real middles; how many filled toystories are valid

Training cuts a fraction fim_rate of the stories at two places, and rearranges them to

    end-of-text, <|suffix|>, suffix, <|prefix|>, prefix, <|middle|>, middle, end-of-text

The three special tokens follow end-of-text in the vocabulary. They are never targets, so that they get next
to no probability in ordinary text; every other token is still predicted once. A row keeps its length: special
tokens push as many tokens out at its end. Evaluation is unchanged: ordinary text, from left to right.
"""

import random
import re
import sys
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":  # this script imports from the repository
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import experiments
from model import check_settings
from nanostlm import checkpoint, machine, score, settings, sources, stats, tasks
from nanostlm.data import load_data
from nanostlm.generate import generate
from nanostlm.tokenizer import FIM


@dataclass(frozen=True)
class Config:
    fim_rate: float = 0.5  # fraction of the stories that are rearranged

    def validate(self) -> None:
        check_settings(self, {"fim_rate": (0, 1)}, {})


class Objective(experiments.Objective):
    """The cross-entropy of batches in which some stories are rearranged."""

    special = FIM

    def __init__(self, config, model: nn.Module, data):
        super().__init__(config, model, data)
        self.eot, self.ids = data.tokenizer.eot, data.tokenizer.fim_ids()

    def __call__(self, model, idx: Tensor, targets: Tensor, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        rows, seed = torch.cat((idx, targets[:, -1:]), dim=1), (self.train_config.seed, step)
        rows = rearrange(rows, self.eot, self.ids, self.config.fim_rate, seed)
        loss = model(rows[:, :-1], rows[:, 1:].masked_fill(rows[:, 1:] > self.eot, -1))[1]
        return loss, {"loss": loss}


def rearrange(rows: Tensor, eot: int, special: list[int], rate: float, seed: tuple[int, ...]) -> Tensor:
    """
    Rows of ids (B, T) -> (B, T), with a fraction `rate` of the stories, or parts of stories, in the order
    suffix, prefix, middle. `special` are the ids that precede these three. What is cut, and where, depends on
    `seed` and on the row alone, and so not on how the processes and micro-batches share a batch.
    """
    key = int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0] >> 1)
    T, ends, at = rows.shape[1], rows == eot, torch.arange(rows.shape[1], device=rows.device)
    begins = F.pad(ends[:, :-1], (1, 0), value=True)  # at the first token of each story
    story, start = begins.cumsum(dim=1) - 1, (at * begins).cummax(dim=1).values
    n = torch.zeros_like(rows).scatter_add(1, story, (~ends).long()).gather(1, story)  # without end-of-text
    row = hashed(rows + hashed(at)).sum(dim=1, keepdim=True)
    coin, a, b = (hashed(hashed(row + key) + 3 * start + k) for k in range(3))  # equal within a story
    chosen = (coin % 2**31 < rate * 2**31) & (n > 0)
    a, b = torch.stack((a, b)).remainder(n + 1).sort(dim=0).values  # prefix: up to a; suffix: from b on

    # i: the place of a token in its story; moved: its place once the story is rearranged
    start, i = start + 3 * ((begins & chosen).cumsum(dim=1) - chosen.long()), at - start
    moved = torch.where(i < b, i + n - b + 2 + (i >= a), torch.where(i < n, i - b + 1, n + 3))
    out = rows.new_zeros(len(rows), T + 1)  # the last column takes what does not fit
    out.scatter_(1, (start + torch.where(chosen, moved, i)).clamp(max=T), rows)
    for token, offset in zip(special, (0, n - b + 1, n - b + a + 2), strict=True):
        out.scatter_(1, torch.where(begins & chosen, start + offset, T).clamp(max=T), token)
    return out[:, :T]


def hashed(x: Tensor) -> Tensor:
    """A hash of int64 numbers, 0 to 2^63 - 1: SplitMix64's (Steele et al. 2014), equal on all devices."""
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15), (31, 1)):
        x = (x ^ (x >> shift & (1 << 64 - shift) - 1)) * factor
    return x & 2**63 - 1


# ----------------------------------------------------------------------------------------------------------
# How well a model fills in


def patterns() -> dict[str, str]:
    """Regular expressions of parts of toystories, each with the space before it."""
    from nanostlm.toystories import GRAMMAR

    lists = {"name": [], "object": []}
    for name, rows in GRAMMAR.lists.items():
        lists.get(GRAMMAR.kinds[name] * (name != "look"), []).extend(row[0] for row in rows)  # not adjectives
    found = {kind: rf" ?\b(?:{'|'.join(words)})\b" for kind, words in lists.items()}
    end = r'[.!?]"?(?=\s[A-Z"]|$)'
    return found | {"sentence": rf"(?:Mrs?\.|(?!{end}).|\n)+{end}"}


def measure(run: str, limit: int, data_dir: str = "") -> list[tuple[str, stats.Figure]]:
    """
    On `limit` validation stories: the nats of a random middle, given prefix and suffix, and given the prefix
    alone; on toystories, how many are valid once a part is written anew, at temperature 1.
    """
    model, tokenizer, state = checkpoint.build(checkpoint.find(run), machine.choose_device("auto"))
    trained, rng, eot, encode = state["train_config"], random.Random(0), tokenizer.eot, tokenizer.encode
    folder = Path(data_dir or trained["data_dir"], trained["dataset"], trained["tokenizer"])
    texts = tasks.validation_texts(load_data(folder, tokenizer=tokenizer))
    texts = [text for text in texts if 0 < len(encode(text)) <= model.config.block_size - 4][:limit]
    filled, continued = [], []
    for ids in map(encode, texts):
        a, b = sorted(rng.sample(range(len(ids) + 1), 2))
        filled.append(([eot, *tokenizer.fill_prompt(ids[:a], ids[b:])], ids[a:b]))
        continued.append(([eot, *ids[:a]], ids[a:b]))
    fim, plain = (-score.loglikelihoods(model, pairs)[0] for pairs in (filled, continued))
    nats = {"after prefix and suffix": fim, "after the prefix": plain, "difference": plain - fim}
    size = [len(middle) for _, middle in filled]
    figures = [("middle", stats.ratio(f"nats per token, {name}", x, size)) for name, x in nats.items()]
    check = sources.corpus(trained["dataset"]).check
    for kind, pattern in patterns().items() if check else ():
        found = [(text, [*re.finditer(pattern, text)]) for text in texts]
        cuts = [(text, rng.choice(matches)) for text, matches in found if matches]
        parts = [(text[: cut.start()], text[cut.end() :]) for text, cut in cuts]
        prompts = [tokenizer.fill_prompt(*map(encode, pair)) for pair in parts]
        new = map(tokenizer.decode, generate(model, prompts, 100, eot=eot))
        valid = [check(a + middle + b).ok for (a, b), middle in zip(parts, new, strict=True)]
        figures.append(("toystories", stats.proportion(f"valid with a new {kind}", sum(valid), len(valid))))
    return figures


def main(argv: list[str]) -> None:
    parser = settings.Parser(description="Measure how well a model fills in the middle of stories.")
    parser.add_argument("run", metavar="RUN", help="a run of objective=fim, or a checkpoint")
    parser.add_argument("--limit", type=int, default=300, help="stories of the validation file")
    parser.add_argument("--data_dir", default="", help="as in train.py; default: that of the run")
    options = vars(parser.parse_args(argv))
    print(stats.table({options["run"]: measure(**options)}))


if __name__ == "__main__":
    from nanostlm.entry import script

    sys.exit(script(main)(sys.argv[1:]))
