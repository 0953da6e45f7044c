"""Corrupted continuations: each does what its name says, and differs from the original."""

import random
from collections import Counter

import pytest

from nanostlm import corruptions, toystories
from nanostlm.corruptions import CORRUPTIONS, corrupt, sentences, words

TEXT = ' Tom saw Mia. "Hi!" she said to him.\nThey ran to the big, old park and played there. The end.'
OTHER = " Ben was sad. He lost his kite in the wind."
NAMES = frozenset(["Tom", "Mia", "Ben"])


@pytest.fixture(scope="module")
def halves() -> list[str]:
    """Second halves of 40 toystories."""
    parts = [sentences(text) for text, _ in (next(toystories.stories(3, i)) for i in range(40))]
    return ["".join(part[len(part) // 2 :]) for part in parts]


def test_sentences_and_words_are_the_text():
    assert sentences(TEXT) == [
        " Tom saw Mia.",
        ' "Hi!"',
        " she said to him.",
        "\nThey ran to the big, old park and played there.",
        " The end.",
    ]
    assert "".join(words(TEXT)) == TEXT and words(" a\nbc.") == [" a", "\nbc."]
    assert (
        sentences("No end") == ["No end"] and sentences("Mr. T.\n") == ["Mr.", " T."] and sentences("") == []
    )


def test_there_are_at_least_12():
    assert len(CORRUPTIONS) >= 12


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_same_for_the_same_seed_and_never_the_original(name, halves):
    names, others = corruptions.known_names(halves), [*halves[1:], halves[0]]

    def corrupted(seed):
        pairs = enumerate(zip(halves, others, strict=True))
        return [corrupt(name, text, f"{seed} {i}", other, names) for i, (text, other) in pairs]

    found, again = corrupted(1), corrupted(1)
    assert found == again
    assert all(new != old for new, old in zip(found, halves, strict=True))
    assert sum(new is not None for new in found) > 20
    if "shuffled" in name or "neighboring" in name:
        assert found != corrupted(2)
        for new, old in zip(found, halves, strict=True):
            assert new is None or Counter(new) == Counter(old), "only the order changes"


def test_shuffled_ngrams_keep_their_words_together():
    text = "".join(f" w{i}" for i in range(60))
    for n in (1, 2, 3, 6, 12):
        name = f"{n}-grams shuffled" if n > 1 else "words shuffled"
        new = [int(word.strip()[1:]) for word in words(corrupt(name, text, "s", OTHER))]
        pieces = [new[i : i + n] for i in range(0, 60, n)]
        assert all(piece == list(range(piece[0], piece[0] + n)) and piece[0] % n == 0 for piece in pieces)
        assert pieces != sorted(pieces)


def test_words_are_dropped_repeated_and_swapped():
    text = "".join(f" w{i}" for i in range(40))
    dropped, repeated, swapped = (
        words(corrupt(name, text, "s", OTHER))
        for name in ("words dropped", "words repeated", "neighboring words swapped")
    )
    assert (
        len(dropped) == 36
        and set(dropped) < set(words(text))
        and dropped == sorted(dropped, key=words(text).index)
    )
    assert len(repeated) == 44 and list(dict.fromkeys(repeated)) == words(text)
    moved = sum(a != b for a, b in zip(swapped, words(text), strict=True))
    assert 4 <= moved <= 8 and sorted(swapped) == sorted(words(text))


def test_names_and_pronouns_are_swapped():
    assert corrupt("names swapped", TEXT, "s", OTHER, NAMES).startswith(" Mia saw Tom.")
    one = corrupt("names swapped", " Tom ran. Tom fell.", "s", OTHER, NAMES)
    assert one == " Ben ran. Ben fell.", "a name of the other story"
    assert corrupt("names swapped", " The dog ran.", "s", OTHER, NAMES) is None
    new = corrupt("pronouns swapped", " He gave her his hat. She thanked him himself.", "s", OTHER)
    assert new == " She gave him her hat. He thanked her herself."
    assert corrupt("pronouns swapped", " The theme was other.", "s", OTHER) is None


def test_sentences_are_dropped_repeated_replaced_and_cut():
    assert corrupt("truncated", TEXT, "s", OTHER) == "".join(sentences(TEXT)[:2])
    assert corrupt("another story's ending", TEXT, "s", OTHER) == OTHER
    dropped = sentences(corrupt("sentence dropped", TEXT, "s", OTHER))
    assert len(dropped) == 4 and dropped[-1] == " The end." and set(dropped) < set(sentences(TEXT))
    repeated = sentences(corrupt("sentence repeated", TEXT, "s", OTHER))
    assert len(repeated) == 6 and list(dict.fromkeys(repeated)) == sentences(TEXT)
    replaced = sentences(corrupt("sentence of another story", TEXT, "s", OTHER))
    assert len(set(replaced) & set(sentences(OTHER))) == 1 and len(set(replaced) & set(sentences(TEXT))) == 4


def test_texts_that_cannot_be_corrupted_have_none():
    for name in CORRUPTIONS:
        new = corrupt(name, " One.", "s", " One.")
        assert new is None or new != " One."
    assert corrupt("sentences shuffled", " The same. The same.", "s", OTHER) is None
    assert corrupt("words shuffled", " Word", "s", OTHER) is None
    assert corrupt("truncated", " One sentence.", "s", OTHER) is None


def test_known_names():
    texts = [
        "One day, Tom met Mia. Then they ran. I saw Mr. Brown and the Sun. The sun and the sun.",
        "Tom and Mia",
    ]
    assert corruptions.known_names(texts) == {"Mia", "Tom"}


def test_known_names_of_toystories():
    texts = [text for text, _ in (next(toystories.stories(0, i)) for i in range(300))]
    heroes = {"Lily", "Mia", "Anna", "Sue", "Emma", "Lucy", "Tom", "Ben", "Tim", "Max", "Leo", "Jack"}
    found = corruptions.known_names(texts)
    assert heroes <= found and not found & {"The", "He", "She", "They", "One", "Then"}


def test_seeds_are_independent_of_the_global_generator():
    random.seed(1)
    state = random.getstate()
    corrupt("words shuffled", TEXT, "s", OTHER)
    assert random.getstate() == state
