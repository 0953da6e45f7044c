/*
 * The engine of the page that `export.py --to html` writes: tokenizer, samplers, and the Worker that runs the
 * model (model.js). It has no dependencies, and runs in Node, too:
 *
 *   const { load, Sequence, probabilities, draw, uniform } = require("./engine.js");
 *   const { tokenizer, model } = load(file);                   // the page's data: see describe() in html.py
 *   const logits = new Sequence(model).logits([tokenizer.eot, ...tokenizer.encode("Once upon a time")]);
 *   const id = draw(probabilities(logits, { temperature: 1, top_p: 0.9 }), uniform(seed, n));
 */
"use strict";

// In the page, model.js stands before this file.
if (typeof module !== "undefined") Object.assign(globalThis, require("./model.js"));

// ---------------------------------------------------------------------------------------------------------
// Tokenizer: byte-level BPE

/** GPT-2's split into words. \p{White_Space} and not \s, which in JavaScript has other characters. */
const SPLIT = new RegExp([
  /'(?:[sdmt]|ll|ve|re)/, / ?\p{L}+/u, / ?\p{N}+/u, / ?[^\p{White_Space}\p{L}\p{N}]+/u,
  /\p{White_Space}+(?!\P{White_Space})/u, /\p{White_Space}/u,
].map((part) => part.source).join("|"), "gu");

/** Bytes of base64 text, decoded in pieces: atob of all at once would need a second copy of a large model. */
function fromBase64(text) {
  const padding = text.endsWith("==") ? 2 : text.endsWith("=") ? 1 : 0;
  const bytes = new Uint8Array((text.length / 4) * 3 - padding);
  for (let start = 0, at = 0; start < text.length; start += 1 << 20) {
    const piece = atob(text.slice(start, start + (1 << 20)));
    for (let i = 0; i < piece.length; i++) bytes[at++] = piece.charCodeAt(i);
  }
  return bytes;
}

/** Byte strings are JavaScript strings of characters 0 to 255: they can be joined, and be keys of a Map. */
class Tokenizer {
  /** tokens: the byte strings of ids 0, 1, ... in base64, separated by spaces; end-of-text is the next id. */
  constructor(tokens) {
    this.tokens = tokens.split(" ").map((token) => atob(token));
    this.ranks = new Map(this.tokens.map((token, id) => [token, id]));
    this.eot = this.tokens.length;
  }

  /** Ids of a text. It cannot become end-of-text. A lone surrogate is read as U+FFFD. */
  encode(text) {
    const encoder = new TextEncoder();
    const binary = (word) => Array.from(encoder.encode(word), (byte) => String.fromCharCode(byte)).join("");
    return (text.match(SPLIT) ?? []).flatMap((word) => this.merge(binary(word)));
  }

  /** Merge the pair of parts whose joined bytes have the lowest id, the leftmost of equals. */
  merge(word) {
    if (this.ranks.has(word)) return [this.ranks.get(word)];
    const parts = [...word];
    const last = (i) => i + 1 >= parts.length;
    const rank = (i) => (last(i) ? Infinity : this.ranks.get(parts[i] + parts[i + 1]) ?? Infinity);
    const ranks = parts.map((_, i) => rank(i)); // of the pair that begins with part i
    for (;;) {
      let best = 0;
      for (let i = 1; i < ranks.length; i++) if (ranks[i] < ranks[best]) best = i;
      if (!(ranks[best] < Infinity)) return parts.map((part) => this.ranks.get(part));
      parts.splice(best, 2, parts[best] + parts[best + 1]);
      ranks.splice(best + 1, 1);
      ranks[best] = rank(best);
      if (best > 0) ranks[best - 1] = rank(best - 1);
    }
  }

  /** Bytes of an id; may begin or end inside a character. */
  bytes(id) {
    return Uint8Array.from(this.tokens[id] ?? "", (char) => char.charCodeAt(0));
  }
}

// ---------------------------------------------------------------------------------------------------------
// Samplers

/** Probabilities after temperature and top_p, which sets those of excluded tokens to 0. */
function probabilities(logits, { temperature = 1, top_p = 1 }) {
  let best = 0;
  for (let i = 1; i < logits.length; i++) if (logits[i] > logits[best]) best = i;
  if (!Number.isFinite(logits[best])) throw new Error("the logits are not finite: the training diverged");
  const probs = new Float64Array(logits.length);
  if (temperature < 1e-5) { // greedy: the lowest id among equals
    probs[best] = 1;
    return probs;
  }
  let total = 0;
  for (let i = 0; i < probs.length; i++) {
    total += probs[i] = Math.exp((logits[i] - logits[best]) / temperature);
  }
  for (let i = 0; i < probs.length; i++) probs[i] /= total;
  if (top_p >= 1) return probs;
  // The smallest set of likely tokens with a sum of at least top_p, and those tied with the last one. A few
  // tokens are nearly always enough, and a full sort would take longer than the model.
  let kept = [], floor = 1e-2;
  do {
    kept = probs.filter((p) => p >= floor * probs[best]);
    floor = floor < 1e-9 ? 0 : floor * 1e-2;
  } while (kept.reduce((a, b) => a + b, 0) < top_p - 1e-6 && kept.length < probs.length);
  kept.sort().reverse();
  let last = 0;
  for (let sum = kept[0]; sum < top_p - 1e-6 && last < kept.length - 1; sum += kept[last]) last++;
  total = 0;
  for (let i = 0; i < probs.length; i++) total += probs[i] >= kept[last] ? probs[i] : (probs[i] = 0);
  for (let i = 0; i < probs.length; i++) probs[i] /= total;
  return probs;
}

/** The id at which the sum of probabilities passes u, 0 <= u < 1. */
function draw(probs, u) {
  let last = 0;
  for (let id = 0, sum = 0; id < probs.length; id++) {
    if (!probs[id]) continue;
    last = id;
    if ((sum += probs[id]) > u) break;
  }
  return last; // rounding may leave the sum of all below u
}

/**
 * A number in [0, 1) that depends on the seed and on n only (murmur3's finalizer). The n-th token of a story
 * uses the n-th number, so that a story can be continued from any token, and repeated.
 */
function uniform(seed, n) {
  const mix = (x) => {
    x = Math.imul(x ^ (x >>> 16), 0x85ebca6b);
    x = Math.imul(x ^ (x >>> 13), 0xc2b2ae35);
    return (x ^ (x >>> 16)) >>> 0;
  };
  return mix(mix(seed + 0x9e3779b9) + n) / 2 ** 32;
}

/** What the page shows of a token: raw and final probability, the likeliest alternatives, and the copy. */
function describe({ model, offset }, logits, probs, id, alternatives = 10) {
  const logZ = logSumExp(logits);
  const top = [];
  for (let i = 0; i < logits.length; i++) {
    if (top.length === alternatives && logits[i] <= logits[top[alternatives - 1]]) continue;
    let at = top.length;
    while (at > 0 && logits[top[at - 1]] < logits[i]) at--;
    top.splice(at, 0, i);
    top.length = Math.min(top.length, alternatives);
  }
  const entry = (token) => {
    const { logp, position } = model.pointer?.copy(token) ?? { logp: -Infinity, position: -1 };
    const copied = Math.min(1, Math.exp(logp - logits[token] + logZ)); // the copies' part of the probability
    const from = position < 0 ? -1 : position + offset; // in the history
    return { id: token, raw: Math.exp(logits[token] - logZ), final: probs[token], copied, from };
  };
  return { ...entry(id), bits: (logZ - logits[id]) / Math.LN2, alternatives: top.map(entry) };
}

// ---------------------------------------------------------------------------------------------------------
// Loading, and the Worker

/** The last of a prompt's ids that fit into the context, after end-of-text. */
function fit(ids, block_size) {
  return ids.slice(Math.max(0, ids.length - block_size + 1));
}

function load({ config, tensors, tokens, weights }) {
  return { tokenizer: new Tokenizer(tokens), model: new Model(config, tensors, fromBase64(weights)) };
}

if (typeof module !== "undefined") {
  module.exports = { load, fit, Tokenizer, Sequence, probabilities, draw, uniform, describe };
} else {
  let tokenizer, sequence;
  let job = 0; // the page's number of the story that is being written; 0: none

  /** Let messages arrive; a timeout would wait for at least 4 ms. */
  const pause = () => new Promise((resolve) => {
    const channel = new MessageChannel();
    channel.port1.onmessage = resolve;
    channel.port2.postMessage(null);
  });

  /**
   * Write up to `count` tokens after `history` (ids); given ids are described, not drawn. Results are sent
   * about once a frame; a newer message ends the loop.
   */
  const write = async ({ job: mine, history, prompt = "", given = [], count, seed, ...sampling }) => {
    job = mine;
    const encoded = tokenizer.encode(prompt);
    if (prompt) given = fit(encoded, sequence.model.config.block_size);
    const dropped = prompt ? encoded.length - given.length : 0;
    const ids = [...history];
    let tokens = [], sent = performance.now(), began = sent, id = -1;
    for (let n = 0; n < given.length + count && id !== tokenizer.eot; n++) {
      if (n === given.length) began = performance.now(); // the speed is that of writing
      const logits = sequence.logits(ids);
      const probs = probabilities(logits, sampling);
      id = n < given.length ? given[n] : draw(probs, uniform(seed, ids.length));
      const token = describe(sequence, logits, probs, id);
      ids.push(id);
      tokens.push({ ...token, given: n < given.length });
      if (performance.now() - sent > 15) {
        postMessage({ job: mine, tokens });
        [tokens, sent] = [[], performance.now()];
        await pause();
        if (job !== mine) return;
      }
    }
    postMessage({ job: mine, tokens, done: true, dropped, seconds: (performance.now() - began) / 1000 });
  };

  onmessage = ({ data }) => {
    if (data.file) {
      const loaded = load(data.file);
      tokenizer = loaded.tokenizer;
      sequence = new Sequence(loaded.model);
      postMessage({ ready: true });
    } else if (data.stop) job = 0;
    else write(data).catch((error) => postMessage({ job: data.job, error: error.message, done: true }));
  };
}
