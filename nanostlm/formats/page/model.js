/*
 * GPT of model.py with the KV cache of nanostlm/kv_cache.py and the pointer of nanostlm/variants.py, with
 * their names, one token at a time.
 *
 *   const sequence = new Sequence(new Model(config, tensors, bytes)); // of describe() and pack() in html.py
 *   sequence.logits(history);                                         // (vocab_size,), of the next token
 *
 * All activations are Float32Arrays: storing a number rounds it to float32, as in PyTorch.
 */
"use strict";

// ---------------------------------------------------------------------------------------------------------
// Operations on Float32Arrays

/** out = weight @ x + bias: weight (rows, x.length) row-major. Four rows at a time share the loads of x. */
function linear(weight, x, out, bias) {
  const K = x.length;
  const N = out.length;
  let n = 0;
  for (; n + 4 <= N; n += 4) {
    let r0 = n * K, r1 = r0 + K, r2 = r1 + K, r3 = r2 + K;
    let s0 = 0, s1 = 0, s2 = 0, s3 = 0;
    for (let k = 0; k < K; k++) {
      const xk = x[k];
      s0 += weight[r0++] * xk;
      s1 += weight[r1++] * xk;
      s2 += weight[r2++] * xk;
      s3 += weight[r3++] * xk;
    }
    out[n] = s0;
    out[n + 1] = s1;
    out[n + 2] = s2;
    out[n + 3] = s3;
  }
  for (; n < N; n++) out[n] = dot(weight, n * K, x, 0, K);
  if (bias) for (let i = 0; i < N; i++) out[i] += bias[i];
  return out;
}

/** Sum of a[i + k] * b[j + k] for k < length. */
function dot(a, i, b, j, length) {
  let sum = 0;
  for (let k = 0; k < length; k++) sum += a[i + k] * b[j + k];
  return sum;
}

/** x / rms(x) * weight, in place, over `length` numbers from x[at]. */
function rmsNorm(x, eps, weight, at = 0, length = x.length) {
  const scale = 1 / Math.sqrt(dot(x, at, x, at, length) / length + eps);
  for (let i = 0; i < length; i++) x[at + i] *= weight ? scale * weight[i] : scale;
}

function layerNorm(x, eps, weight, bias) {
  let mean = 0, variance = 0;
  for (const value of x) mean += value / x.length;
  for (const value of x) variance += (value - mean) ** 2 / x.length;
  const scale = 1 / Math.sqrt(variance + eps);
  for (let i = 0; i < x.length; i++) {
    x[i] = (x[i] - mean) * scale * (weight ? weight[i] : 1) + (bias ? bias[i] : 0);
  }
}

/** Abramowitz & Stegun 7.1.26: the error is below 1.5e-7, like a rounding to float32. */
function erf(x) {
  const t = 1 / (1 + 0.3275911 * Math.abs(x));
  const a = [1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592, 0];
  return Math.sign(x) * (1 - a.reduce((sum, coefficient) => sum * t + coefficient) * Math.exp(-x * x));
}

const silu = (x) => x / (1 + Math.exp(-x));
const gelu = (x) => 0.5 * x * (1 + erf(x * Math.SQRT1_2));
const GATED = { swiglu: silu, geglu: gelu }; // act(gate) * up
const UNGATED = {
  gelu,
  gelu_tanh: (x) => 0.5 * x * (1 + Math.tanh(Math.sqrt(2 / Math.PI) * (x + 0.044715 * x ** 3))),
  relu: (x) => Math.max(x, 0),
  relu2: (x) => Math.max(x, 0) ** 2,
  silu,
  tanh: Math.tanh,
  leaky_relu: (x) => (x > 0 ? x : 0.01 * x),
};

/** log(sum(exp(x))) */
function logSumExp(x) {
  let top = -Infinity, sum = 0;
  for (let i = 0; i < x.length; i++) if (x[i] > top) top = x[i];
  if (top === -Infinity) return top;
  for (let i = 0; i < x.length; i++) sum += Math.exp(x[i] - top);
  return top + Math.log(sum);
}

function logAddExp(a, b) {
  const top = Math.max(a, b);
  return top === -Infinity ? top : top + Math.log1p(Math.exp(Math.min(a, b) - top));
}

/** RoPE's angles, rounded where PyTorch rounds: position * theta^(-i / dim) for even i < dim. */
function ropeAngles(position, dim, theta) {
  return Float32Array.from({ length: Math.ceil(dim / 2) }, (_, i) =>
    Math.fround(position * Math.fround(theta ** Math.fround((-2 * i) / dim))));
}

/** ALiBi's slope of each head: powers of 2^(-8/n), n the power of 2 up to `heads`; then those between. */
function alibiSlopes(heads) {
  const n = 2 ** Math.floor(Math.log2(heads));
  const between = (i) => 2 ** ((-8 * (2 * (i - n) + 1)) / (2 * n));
  return Array.from({ length: heads }, (_, i) => (i < n ? 2 ** ((-8 * (i + 1)) / n) : between(i)));
}

// ---------------------------------------------------------------------------------------------------------
// Model

/** GPT of model.py: step(id) appends a token to the KV cache and returns the logits of the next one. */
class Model {
  /** config: the fields of GPTConfig; tensors: name in the state_dict -> [offset in bytes, rows, columns]. */
  constructor(config, tensors, bytes) {
    this.config = config;
    this.weights = new Map();
    const expanded = new Map(); // weights that several layers share have the same offset
    for (const [name, [at, rows, columns]] of Object.entries(tensors)) {
      if (!expanded.has(at)) expanded.set(at, dequantize(bytes.buffer, at, rows, columns));
      this.weights.set(name, expanded.get(at));
    }
    const c = config;
    this.head_dim = c.n_embd / c.n_head;
    this.n_kv_head = c.n_kv_head || c.n_head;
    this.window = Math.min(c.block_size, c.window || c.block_size); // tokens that a token attends to
    const kv = this.n_kv_head * this.head_dim;
    const qkv = c.n_embd + 2 * kv;
    this.hidden = (this.weights.get("core.blocks.0.mlp.fc.weight") ??
      this.weights.get("core.blocks.0.mlp.fc.base.weight")).length / c.n_embd; // gate and up together
    const floats = (n) => new Float32Array(n);
    this.x = floats(c.n_embd);
    this.normed = floats(c.n_embd);
    this.qkv = floats(qkv);
    this.y = floats(c.n_embd); // of attention
    this.out = floats(c.n_embd); // of a block's attention or MLP
    this.fc = floats(this.hidden);
    this.act = floats(c.mlp in GATED ? this.hidden / 2 : this.hidden);
    this.logits = floats(c.vocab_size);
    this.scores = floats(this.window);
    // The cache: position p is in column p % window
    this.seen = 0; // tokens so far
    this.keys = Array.from({ length: c.n_layer }, () => floats(this.window * kv));
    this.values = Array.from({ length: c.n_layer }, () => floats(this.window * kv));
    this.starts = new Int32Array(this.window); // position at which the token's segment starts
    if (c.pointer) this.pointer = new Pointer(this);
    if (c.position === "alibi") this.slopes = alibiSlopes(c.n_head);
    this.distances = c.position === "shaw" ? floats(c.shaw_clip + 1) : null;
  }

  /** Forget all but the first n tokens; 0 if the cache has dropped some of those that they attend to. */
  truncate(n) {
    this.seen = this.seen > this.window ? 0 : Math.min(this.seen, n);
    return this.seen;
  }

  /** Append a token; return the logits of the next, (vocab_size,), with a pointer log-probabilities. */
  step(id) {
    const c = this.config, t = this.seen, column = t % this.window;
    const previous = t ? this.starts[(t - 1) % this.window] : 0;
    this.start = this.starts[column] = id === c.separator ? t : previous;
    this.first = Math.max(this.start, t - this.window + 1); // the first position that this one attends to
    this.embed(id, t - this.start);
    for (let layer = 0; layer < c.n_layer; layer++) {
      const name = `core.blocks.${layer}.`;
      this.norm(name + "norm1", this.x, this.normed);
      this.attention(name + "attn", layer);
      for (let i = 0; i < c.n_embd; i++) this.x[i] += this.out[i];
      this.norm(name + "norm2", this.x, this.normed);
      this.mlp(name + "mlp");
      for (let i = 0; i < c.n_embd; i++) this.x[i] += this.out[i];
    }
    this.pointer?.update(this.x, id);
    this.norm("head.norm", this.x, this.normed);
    const head = c.tied ? "embedder.tokens.weight" : "head.linear.weight";
    linear(this.weights.get(head), this.normed, this.logits);
    const cap = c.softcap;
    if (cap) for (let i = 0; i < c.vocab_size; i++) this.logits[i] = cap * Math.tanh(this.logits[i] / cap);
    this.pointer?.mix(this.logits);
    this.seen++;
    return this.logits;
  }

  /** x = the token's embedding, plus that of its position in the segment. */
  embed(id, position) {
    const c = this.config, C = c.n_embd, x = this.x;
    x.set(this.weights.get("embedder.tokens.weight").subarray(id * C, (id + 1) * C));
    if (c.position === "learned") {
      const table = this.weights.get("embedder.positions.weight");
      for (let i = 0; i < C; i++) x[i] += table[position * C + i];
    } else if (c.position === "sinusoidal") {
      const angles = ropeAngles(position, C + (C % 2), c.rope_theta);
      for (let i = 0; i < C; i++) x[i] += i % 2 ? Math.cos(angles[i >> 1]) : Math.sin(angles[i >> 1]);
    } else if (c.position === "rope") {
      const angles = ropeAngles(position, this.head_dim, c.rope_theta);
      this.cos = angles.map(Math.cos);
      this.sin = angles.map(Math.sin);
    }
    if (c.embed_norm) this.norm("embedder.norm", x, x);
  }

  norm(name, x, out) {
    const { norm, norm_eps } = this.config;
    out.set(x);
    const weight = this.weights.get(name + ".weight");
    if (norm === "rmsnorm") rmsNorm(out, norm_eps, weight);
    else if (norm === "layernorm") layerNorm(out, norm_eps, weight, this.weights.get(name + ".bias"));
  }

  /** A linear layer by name. Layers that share weights can have a low-rank part of their own (LoRA). */
  linear(name, x, out) {
    const weight = this.weights.get(name + ".weight");
    if (weight) return linear(weight, x, out, this.weights.get(name + ".bias"));
    this.linear(name + ".base", x, out);
    const down = linear(this.weights.get(name + ".down.weight"), x, new Float32Array(this.config.lora_rank));
    const up = linear(this.weights.get(name + ".up.weight"), down, new Float32Array(out.length));
    for (let i = 0; i < out.length; i++) out[i] += up[i];
    return out;
  }

  attention(name, layer) {
    const c = this.config, d = this.head_dim, t = this.seen, window = this.window, { qkv, y, scores } = this;
    const kv = this.n_kv_head * d, keys = this.keys[layer], values = this.values[layer];
    this.linear(name + ".qkv", this.normed, qkv);
    for (let at = 0; at < c.n_embd + kv; at += d) { // the heads of q, then those of k
      const norm = at < c.n_embd ? ".q_norm.weight" : ".k_norm.weight";
      if (c.qk_norm) rmsNorm(qkv, c.norm_eps, this.weights.get(name + norm), at, d);
      if (c.position === "rope") this.rotate(qkv, at);
    }
    keys.set(qkv.subarray(c.n_embd, c.n_embd + kv), (t % window) * kv);
    values.set(qkv.subarray(c.n_embd + kv), (t % window) * kv);
    const length = t - this.first + 1, scale = d ** -0.5;
    y.fill(0);
    for (let head = 0; head < c.n_head; head++) {
      const q = head * d, group = Math.floor(head / (c.n_head / this.n_kv_head)) * d;
      const bias = this.attentionBias(name, head);
      let top = -Infinity, sum = 0;
      for (let i = 0; i < length; i++) {
        const at = ((this.first + i) % window) * kv + group;
        scores[i] = dot(qkv, q, keys, at, d) * scale;
        if (bias) scores[i] += bias(length - 1 - i);
        if (scores[i] > top) top = scores[i];
      }
      for (let i = 0; i < length; i++) sum += scores[i] = Math.exp(scores[i] - top);
      for (let i = 0; i < length; i++) {
        const at = ((this.first + i) % window) * kv + group, p = scores[i] / sum;
        for (let k = 0; k < d; k++) y[q + k] += p * values[at + k];
        if (c.shaw_values && this.distances) this.addDistance(name, length - 1 - i, p, q);
      }
    }
    this.linear(name + ".proj", y, this.out);
  }

  /** Rotate a head of q or k at qkv[at]: dimension i is paired with i + head_dim / 2. */
  rotate(qkv, at) {
    const half = this.head_dim / 2;
    for (let i = at; i < at + half; i++) {
      const a = qkv[i], b = qkv[i + half], cos = this.cos[i - at], sin = this.sin[i - at];
      qkv[i] = a * cos - b * sin;
      qkv[i + half] = b * cos + a * sin;
    }
  }

  /** distance to a key -> what is added to its score: ALiBi's, or that of Shaw et al.; null: nothing. */
  attentionBias(name, head) {
    const c = this.config, d = this.head_dim;
    if (c.position === "alibi") return (distance) => -this.slopes[head] * distance;
    if (c.position !== "shaw") return null;
    const table = this.weights.get(name + ".key_distance.weight"); // row clip - distance: keys are not ahead
    for (let distance = 0; distance <= c.shaw_clip; distance++) {
      this.distances[distance] = dot(this.qkv, head * d, table, (c.shaw_clip - distance) * d, d) * d ** -0.5;
    }
    return (distance) => this.distances[Math.min(distance, c.shaw_clip)];
  }

  addDistance(name, distance, p, at) {
    const c = this.config, d = this.head_dim;
    const table = this.weights.get(name + ".value_distance.weight");
    const row = (c.shaw_clip - Math.min(distance, c.shaw_clip)) * d;
    for (let k = 0; k < d; k++) this.y[at + k] += p * table[row + k];
  }

  mlp(name) {
    const { fc, act } = this, gate = GATED[this.config.mlp], plain = UNGATED[this.config.mlp];
    this.linear(name + ".fc", this.normed, fc);
    for (let i = 0; i < act.length; i++) act[i] = gate ? gate(fc[i]) * fc[act.length + i] : plain(fc[i]);
    this.linear(name + ".proj", act, this.out);
  }
}

/** A vector in float32, or a matrix in int8 with a float32 scale before for each row, as a Float32Array. */
function dequantize(buffer, at, rows, columns) {
  const scales = new Float32Array(buffer.slice(at, at + 4 * rows));
  if (!columns) return scales;
  const quantized = new Int8Array(buffer, at + 4 * rows, rows * columns);
  const weight = new Float32Array(rows * columns);
  for (let r = 0, i = 0; r < rows; r++) {
    for (let k = 0; k < columns; k++, i++) weight[i] = quantized[i] * scales[r];
  }
  return weight;
}

/** The head that can also copy a token of the context: Pointer and Copies of nanostlm/variants.py. */
class Pointer {
  constructor(model) {
    const c = model.config;
    this.model = model;
    this.eps = c.norm_eps;
    this.C = c.n_embd;
    this.weight = model.weights.get("pointer.qab.weight");
    this.scale = model.weights.get("pointer.scale")[0] * c.n_embd ** -0.5;
    this.sentinel = model.weights.get("pointer.sentinel")[0];
    this.qab = new Float32Array(3 * c.n_embd);
    this.normed = new Float32Array(c.n_embd);
    this.a = new Float32Array(model.window * c.n_embd); // of each column
    this.keys = new Float32Array(model.window * c.n_embd); // norm(a[s] + b[s + 1])
    this.ids = new Int32Array(model.window); // idx[s + 1], what column s copies
    this.scores = []; // of the positions from model.first to before the newest one
    this.from = 0;
  }

  /** Score what the state x of the newest token can copy. Its own key needs the next token's state. */
  update(x, id) {
    const { C, model, qab, normed, keys } = this, t = model.seen, window = model.window;
    normed.set(x);
    rmsNorm(normed, this.eps);
    linear(this.weight, normed, qab);
    if (t > 0) { // the key of the position before
      const at = ((t - 1) % window) * C;
      for (let i = 0; i < C; i++) keys[at + i] = this.a[at + i] + qab[2 * C + i];
      rmsNorm(keys, this.eps, null, at, C);
      this.ids[(t - 1) % window] = id;
    }
    this.a.set(qab.subarray(C, 2 * C), (t % window) * C);
    rmsNorm(qab, this.eps, null, 0, C); // q
    this.from = model.first;
    this.scores.length = t - model.first;
    for (let i = 0; i < this.scores.length; i++) {
      this.scores[i] = this.scale * dot(qab, 0, keys, ((model.first + i) % window) * C, C);
    }
  }

  /** Logits -> log-probabilities of generating or copying each token, in place. */
  mix(logits) {
    this.logZ = logAddExp(logSumExp(this.scores), this.sentinel);
    const shift = this.sentinel - this.logZ - logSumExp(logits);
    for (let i = 0; i < logits.length; i++) logits[i] += shift;
    const copied = new Map();
    this.scores.forEach((score, i) => {
      const id = this.ids[(this.from + i) % this.model.window];
      copied.set(id, logAddExp(copied.get(id) ?? -Infinity, score - this.logZ));
    });
    for (const [id, logp] of copied) logits[id] = logAddExp(logits[id], logp);
  }

  /** The log-probability of copying a token, and the position that it is most likely copied from, or -1. */
  copy(id) {
    let logp = -Infinity, best = -Infinity, position = -1;
    this.scores.forEach((score, i) => {
      if (this.ids[(this.from + i) % this.model.window] !== id) return;
      logp = logAddExp(logp, score - this.logZ);
      if (score > best) [best, position] = [score, this.from + i + 1];
    });
    return { logp, position };
  }
}

/**
 * The tokens that the model has seen. Like Batch in generate.py, it continues past the context. The cache is
 * the model's: a new sequence ends the one before.
 */
class Sequence {
  constructor(model) {
    this.model = model;
    model.truncate(0);
    this.ids = []; // in the cache
    this.offset = 0; // of the first of them in the history
  }

  /** Logits after a history, which begins with end-of-text; reuses what it shares with the last one. */
  logits(history) {
    const { block_size, position } = this.model.config;
    let offset = 0;
    if ((position === "learned" || position === "sinusoidal") && history.length > block_size) {
      // absolute positions end at block_size: restart with the last half of the context
      const skipped = block_size + 1 - Math.max(1, Math.floor(block_size / 2));
      offset = Math.ceil((history.length - block_size) / skipped) * skipped;
    }
    const ids = history.slice(offset);
    let shared = 0;
    while (shared < ids.length - 1 && ids[shared] === this.ids[shared]) shared++;
    if (shared < this.ids.length) shared = this.model.truncate(shared);
    for (let i = shared; i < ids.length; i++) this.model.step(ids[i]);
    [this.ids, this.offset] = [ids, offset];
    return this.model.logits;
  }
}

if (typeof module !== "undefined") module.exports = { Model, Sequence, logSumExp };
