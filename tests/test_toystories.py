"""The built-in corpus: what the grammar promises (proved on its data), and what the stories keep (sampled)."""
import hashlib
import math
import re
import subprocess
import sys
import time
from collections import Counter
from itertools import combinations, islice
from pathlib import Path

import pytest

import toystories
from toystories import GRAMMAR, LISTS, RULES, Choice, Draw, Grammar, Ref, check, derivations, stories

ROOT = Path(toystories.__file__).parent
SAMPLE = list(islice(stories(seed=0), 2000))


# ---------------------------------------------------------------------------------------------------------------
# Proofs about the grammar's data

def rows_of(grammar, source, known):
    """All rows that a draw may choose from, where `known` has the possible rows of each variable."""
    if isinstance(source, Ref):
        options = [row[source.column] for row in known[source.var]]
        assert all(isinstance(o, tuple) for o in options), f"{grammar.variables[source.var]}: a column without options"
        assert len({len(o) for o in options}) == 1, f"{grammar.variables[source.var]}: unequal numbers of options"
        return {row for option in options for row in option}
    return set(source)


def walk(grammar, ops, known, rule=""):
    """Check that all that is told was drawn before, on every way there; return what is known behind it."""
    for op in ops:
        if isinstance(op, Choice):
            ends = [walk(grammar, alternative, dict(known), op.rule or rule) for alternative in op.alternatives]
            known = {var: set().union(*(end[var] for end in ends)) for var in set.intersection(*map(set, ends))}
        elif isinstance(op, Draw):
            if isinstance(op.source, Ref):
                assert op.source.var in known, f"{rule}: {grammar.variables[op.source.var]} is not drawn yet"
            known[op.var] = rows_of(grammar, op.source, known)
            assert all(isinstance(row[op.column], str) for row in known[op.var]), f"{rule}: a draw has nothing to tell"
        elif isinstance(op, Ref):
            assert op.var in known, f"{rule}: {grammar.variables[op.var]} is not drawn yet"
            assert all(isinstance(row[op.column], str) for row in known[op.var]), (
                f"{rule}: {grammar.variables[op.var]} has no {grammar.columns[op.column % len(grammar.columns)]}")
    return known


def test_all_that_is_told_was_drawn():
    walk(GRAMMAR, [GRAMMAR.start], {})
