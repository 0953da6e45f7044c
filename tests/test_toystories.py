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


class Undecided(Exception):
    """Two alternatives were told to their ends without a difference: it depends on what follows them."""


def possible_rows(grammar, var):
    """All rows that a variable may ever remember."""
    rows = []
    for source in grammar.sources.get(grammar.variables[var], ()):
        owner, _, column = source.partition(".")
        if column:
            owners = possible_rows(grammar, grammar.variables.index(owner))
            column = grammar.columns.index(column)
            rows += [option for row in owners if row[column] for option in row[column]]
        else:
            rows += grammar.lists[source]
    return list(dict.fromkeys(rows))


def recall(grammar, ref, own, shared):
    """The possible rows of a variable, each with the memory that goes with it."""
    for memory in own, shared:
        for var, row in memory:
            if var == ref.var:
                return [(row, shared)]
    mine = set(grammar.sources[grammar.variables[ref.var]])
    taken = [row for var, row in own + shared if mine & set(grammar.sources.get((grammar.variables + [""])[var], ()))]
    return [(row, (*shared, (ref.var, row))) for row in possible_rows(grammar, ref.var)
            if row[ref.column] and row not in taken]


def heads(grammar, todo, own, shared):
    """The next texts of what is still to be told: (text, todo, own, shared), where the text is None at the end.

    `own` has the rows drawn on this side, behind the choice; `shared` those drawn before it, guessed when needed.
    """
    while todo and todo[1] == len(todo[0]):
        todo = todo[2]
    if todo is None:
        yield None, None, own, shared
        return
    if todo is False:
        raise Undecided
    ops, i, after = todo
    op, todo = ops[i], (ops, i + 1, after)
    if isinstance(op, str):
        yield op, todo, own, shared
    elif isinstance(op, Choice):
        for alternative in op.alternatives:
            yield from heads(grammar, (alternative, 0, todo), own, shared)
    elif isinstance(op, Ref):
        for row, shared_then in recall(grammar, op, own, shared):
            yield row[op.column], todo, own, shared_then
    else:
        yield from drawn(grammar, op, todo, own, shared)


def drawn(grammar, draw, todo, own, shared):
    if isinstance(draw.source, Ref):
        choices = [(row[draw.source.column], then) for row, then in recall(grammar, draw.source, own, shared)]
    else:
        choices = [(draw.source, shared)]
    for rows, shared_then in choices:
        held = [row for var, row in own + shared_then if var in draw.rivals]
        for row in rows:
            if row not in held:
                yield row[draw.column], todo, (*(m for m in own if m[0] != draw.var), (draw.var, row)), shared_then


def place(todo):
    """A place in the grammar, as a key."""
    while todo and todo[1] == len(todo[0]):
        todo = todo[2]
    return (id(todo[0]), todo[1], place(todo[2])) if todo else todo


def prove_different(grammar, left, right, shared):
    """Fail if two sides, each (text, todo, own), can go on to tell the same text."""
    pairs, seen = [(left, right, shared)], set()
    while pairs:
        left, right, shared = pairs.pop()
        rights = {}                                             # memory -> first letter -> the heads of the right side
        for a, todo_a, own_a, memory in [(*left, shared)] if left[0] else heads(grammar, *left[1:], shared):
            if memory not in rights:
                rights[memory] = {}
                for head in [(*right, memory)] if right[0] else heads(grammar, *right[1:], memory):
                    rights[memory].setdefault(head[0] and head[0][0], []).append(head)
            for b, todo_b, own_b, both in rights[memory].get(a and a[0], []):
                assert a is not None, "there are two ways to tell one story"
                if a.startswith(b) or b.startswith(a):
                    n = min(len(a), len(b))
                    same = set(own_a) & set(own_b)              # forget what both agree about: it proves more, not less
                    mine, theirs = (tuple(m for m in own if m not in same) for own in (own_a, own_b))
                    both = both if len(a) != len(b) else ()
                    key = a[n:], place(todo_a), mine, b[n:], place(todo_b), theirs, both
                    if key not in seen:
                        seen.add(key)
                        pairs.append(((a[n:], todo_a, mine), (b[n:], todo_b, theirs), both))
        assert len(seen) < 20_000, "too alike to tell them apart in reasonable time"


def prove_choice(grammar, op, after):
    """Fail if two alternatives of a Choice, or two rows of a Draw, can be told in the same words."""
    if isinstance(op, Choice):
        sides = [("", (alternative, 0, after), (), ()) for alternative in op.alternatives]
    else:
        sides = list(drawn(grammar, op, after, (), ()))
    for (*left, shared), (*right, shared_too) in combinations(sides, 2):
        if shared == shared_too:
            prove_different(grammar, left, right, shared)


def prove_unambiguous(grammar):
    """Each choice by itself, where that is enough; else in every place where the grammar makes it."""
    undecided = {}                              # id of an operation -> does it, or one inside, need its surroundings?
    alone = set()                               # ids of those that need none

    def decide(op):
        if id(op) not in undecided:
            undecided[id(op)] = False
            try:
                prove_choice(grammar, op, False)
                alone.add(id(op))
            except Undecided:
                undecided[id(op)] = True
            if isinstance(op, Choice):
                inside = [decide(o) for alternative in op.alternatives for o in alternative if isinstance(o, Choice | Draw)]
                undecided[id(op)] |= any(inside)
        return undecided[id(op)]

    def visit(op, after):
        places[0] += 1
        if id(op) not in alone:
            prove_choice(grammar, op, after)
        if isinstance(op, Choice):
            for alternative in op.alternatives:
                for i, inner in enumerate(alternative):
                    if undecided.get(id(inner)):
                        visit(inner, (alternative, i + 1, after))

    places = [0]
    decide(grammar.start)
    visit(grammar.start, None)
    return places[0]


def test_no_text_can_be_told_in_two_ways():
    places = prove_unambiguous(GRAMMAR)
    print(f"proved in {places} places")
