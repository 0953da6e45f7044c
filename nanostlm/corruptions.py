"""
Damaged continuations of stories, for the task `progression`: a model should find the real one more likely.

    corrupted = corrupt("3-grams shuffled", continuation, "seed", other, known_names(stories))

A corruption is a function (text, rng, other, names) -> str | None. `other` is the continuation of another
story, from which it may take sentences, and `names` has the names of the corpus. It returns None where it
cannot be applied, such as the swap of names in a text without names. `corrupt` never returns the text itself.
"""

import random
import re
from collections import Counter
from collections.abc import Callable, Iterable

Corruption = Callable[[str, random.Random, str, frozenset[str]], str | None]
PRONOUNS = {"he": "she", "him": "her", "his": "her", "himself": "herself"}
PRONOUNS |= {"she": "he", "her": "him", "hers": "his", "herself": "himself"}
TITLES = ("Mr", "Mrs", "Ms", "Miss")
SHARE = 0.1  # of the words that a corruption of single words changes, at least one


def sentences(text: str) -> list[str]:
    """The sentences of a text, each with the white space before it."""
    return re.findall(r"\s*\S.*?(?:[.!?][\"'”’]*(?=\s|$)|$)", text, re.DOTALL)


def words(text: str) -> list[str]:
    """The words of a text with their punctuation, each with the white space before it."""
    return re.findall(r"\s*\S+", text)


def known_names(texts: Iterable[str]) -> frozenset[str]:
    """Words that are capitalized after a lowercase one, and more often capitalized than not."""
    inside, every = Counter(), Counter()
    for text in texts:
        inside.update(re.findall(r"(?<=[a-z,] )[A-Z][a-z]+", text))
        every.update(re.findall(r"[A-Za-z][a-z]+", text))
    return frozenset(name for name in inside if every[name] > every[name.lower()] and name not in TITLES)


def positions(n: int, rng: random.Random) -> list[int]:
    """Random positions among n words: a tenth of them, at least one."""
    return sorted(rng.sample(range(n), max(1, round(SHARE * n))))


def shuffled(parts: list[str], rng: random.Random) -> str:
    rng.shuffle(parts)
    return "".join(parts)


def shuffle_ngrams(n: int) -> Corruption:
    """Cut the text into pieces of n words and shuffle them."""

    def corruption(text, rng, other, names):
        parts = words(text)
        return shuffled(["".join(parts[i : i + n]) for i in range(0, len(parts), n)], rng)

    return corruption


def drop_words(text, rng, other, names):
    parts = words(text)
    dropped = set(positions(len(parts), rng))
    return "".join(word for i, word in enumerate(parts) if i not in dropped) or None


def repeat_words(text, rng, other, names):
    parts = words(text)
    repeated = set(positions(len(parts), rng))
    space = [word if word[0].isspace() else f" {word}" for word in parts]
    return "".join(word + space[i] if i in repeated else word for i, word in enumerate(parts))


def swap_words(text, rng, other, names):
    """Swap neighboring words."""
    parts = words(text)
    if len(parts) < 2:
        return None
    for i in positions(len(parts) - 1, rng):
        parts[i], parts[i + 1] = parts[i + 1], parts[i]
    return "".join(parts)


def swap_names(text, rng, other, names):
    """Swap two names of the text, or put a name of the other story in the place of its only name."""
    own, foreign = (
        [word for word in dict.fromkeys(re.findall(r"[A-Z][a-z]+", t)) if word in names]
        for t in (text, other)
    )
    foreign = [name for name in foreign if name not in own]
    if len(own) < 2 and not (own and foreign):
        return None
    a, b = rng.sample(own, 2) if len(own) > 1 else (own[0], rng.choice(foreign))
    swap = {a: b, b: a}
    return re.sub(rf"\b({a}|{b})\b", lambda match: swap[match[0]], text)


def swap_pronouns(text, rng, other, names):
    """Turn he into she, her into him, and so on."""

    def swap(match):
        new = PRONOUNS[match[0].lower()]
        return new.capitalize() if match[0][0].isupper() else new

    return re.sub(rf"\b({'|'.join(PRONOUNS)})\b", swap, text, flags=re.IGNORECASE)


def drop_sentence(text, rng, other, names):
    """Drop a sentence other than the last one."""
    parts = sentences(text)
    if len(parts) < 2:
        return None
    del parts[rng.randrange(len(parts) - 1)]
    return "".join(parts)


def repeat_sentence(text, rng, other, names):
    parts = sentences(text)
    i = rng.randrange(len(parts))
    return "".join([*parts[: i + 1], parts[i] if parts[i][0].isspace() else f" {parts[i]}", *parts[i + 1 :]])


def replace_sentence(text, rng, other, names):
    """Put a sentence of another story in the place of one."""
    parts = sentences(text)
    parts[rng.randrange(len(parts))] = rng.choice(sentences(other))
    return "".join(parts)


def truncate(text, rng, other, names):
    """Drop the second half of the sentences."""
    parts = sentences(text)
    return "".join(parts[: len(parts) // 2]) or None


CORRUPTIONS: dict[str, Corruption] = {
    "another story's ending": lambda text, rng, other, names: other,
    "sentences shuffled": lambda text, rng, other, names: shuffled(sentences(text), rng),
    **{f"{n}-grams shuffled": shuffle_ngrams(n) for n in (12, 6, 3, 2)},
    "words shuffled": shuffle_ngrams(1),
    "words dropped": drop_words,
    "words repeated": repeat_words,
    "neighboring words swapped": swap_words,
    "names swapped": swap_names,
    "pronouns swapped": swap_pronouns,
    "sentence dropped": drop_sentence,
    "sentence repeated": repeat_sentence,
    "sentence of another story": replace_sentence,
    "truncated": truncate,
}


def corrupt(
    name: str, text: str, seed: str, other: str, names: frozenset[str] = frozenset(), attempts: int = 10
) -> str | None:
    """The corruption `name` of a text, the same for the same seed; None if it cannot differ from the text."""
    rng = random.Random(f"{seed} {name}")
    for _ in range(attempts):
        corrupted = CORRUPTIONS[name](text, rng, other, names)
        if corrupted != text:
            return corrupted
    return None
