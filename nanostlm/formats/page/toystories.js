/*
 * Checks stories of the built-in corpus: the parser of nanostlm/toystories.py; its compiled grammar is data.
 *
 *   checkToystory(grammar, text)    // { ok, reach }: no valid story begins with more than `reach` characters
 *
 * An operation of the grammar is a text; the index of a choice, a list of alternatives; [variable, column],
 * that column of the row that the variable holds; or [variable, column, source, rivals]: draw a row that no
 * rival holds. A source is the index of a list of rows, or [variable, column]. Rows are indices, too.
 */
"use strict";

const MAX_STEPS = 20000; // as in toystories.py

function checkToystory({ rows, lists, choices, start, columns }, text) {
  let reach = 0;

  const matches = (expected, at) => {
    let n = 0;
    while (n < expected.length && text[at + n] === expected[n]) n++;
    reach = Math.max(reach, at + n);
    return n === expected.length;
  };

  /** Columns from `columns` on are those before with a capital letter. */
  const cell = (row, column) => {
    const value = rows[row][column % columns] ?? "";
    if (column < columns || typeof value !== "string") return value;
    return value.charAt(0).toUpperCase() + value.slice(1);
  };

  const threads = [{ at: 0, stack: { ops: [start], i: 0, after: null }, memory: [] }];
  for (let steps = 0; threads.length && steps < MAX_STEPS; steps++) {
    let { at, stack, memory } = threads.pop();
    while (stack) { // until this thread forks or fails
      const { ops, i, after } = stack, op = ops[i];
      if (i === ops.length) {
        stack = after;
        continue;
      }
      stack = { ops, i: i + 1, after };
      if (typeof op === "number") {
        for (const ops of choices[op]) {
          const first = typeof ops[0] === "string" ? ops[0] : "";
          if (matches(first, at)) threads.push({ at, stack: { ops, i: 0, after: stack }, memory });
        }
        break;
      }
      if (op.length === 4 && typeof op !== "string") {
        const [variable, column, source, rivals] = op;
        const held = rivals.map((rival) => memory[rival]);
        for (const row of typeof source === "number" ? lists[source] : cell(memory[source[0]], source[1])) {
          const drawn = cell(row, column);
          if (held.includes(row) || !matches(drawn, at)) continue;
          const updated = [...memory];
          updated[variable] = row;
          threads.push({ at: at + drawn.length, stack, memory: updated });
        }
        break;
      }
      const expected = typeof op === "string" ? op : cell(memory[op[0]], op[1]);
      if (!matches(expected, at)) break;
      at += expected.length;
    }
    if (!stack && at === text.length) return { ok: true, reach: at };
  }
  return { ok: false, reach };
}

if (typeof module !== "undefined") module.exports = { checkToystory };
