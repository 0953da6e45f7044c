/*
 * The page around the engine, which runs in a Worker. The story is a path in a tree of tokens: choosing an
 * alternative adds a branch, and no branch is lost.
 */
"use strict";

const $ = (id) => document.getElementById(id);
const model = JSON.parse($("model").textContent);
const toBytes = (base64) => Uint8Array.from(atob(base64), (char) => char.charCodeAt(0));
const tokens = model.tokens.split(" ").map(toBytes);
const eot = tokens.length;
const MAX_TOKENS = 500; // that one click writes
const SURPRISE = 8; // bits, of the darkest shade

let root, tip; // the tree's first token, end-of-text, and the last token of the story
let undos = []; // earlier [root, tip]
let running = false, active = null, pinned = false, dirty = false, hiding;

function element(tag, text, className) {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  if (className) made.className = className;
  return made;
}

// ---------------------------------------------------------------------------------------------------------
// The tree

/** Text that a token completes: a character may be split across tokens, so that bytes are left over. */
function decode(before, bytes) {
  const all = Uint8Array.from([...before, ...bytes]);
  let left = 0;
  for (let i = 1; i <= Math.min(3, all.length); i++) {
    const byte = all[all.length - i];
    if (byte >= 0xc0 && i < (byte >= 0xf0 ? 4 : byte >= 0xe0 ? 3 : 2)) left = i;
    if (byte < 0x80 || byte >= 0xc0) break;
  }
  const end = all.length - left, decoder = new TextDecoder("utf-8", { ignoreBOM: true });
  return { text: decoder.decode(all.slice(0, end)), rest: all.slice(end) };
}

/**
 * A token alone, for the table of alternatives. Line breaks, parts of characters and spaces are visible,
 * except for the space before a word; "–ing" joins the word before.
 */
function label(id) {
  if (id === eot) return "end of story";
  const { text, rest } = decode([], tokens[id]);
  if (rest.length || text.includes("\ufffd")) {
    return [...tokens[id]].map((byte) => "‹" + byte.toString(16).padStart(2, "0") + "›").join("");
  }
  const marked = /^[\p{L}\p{N}]/u.test(text) ? "–" + text : text.replace(/^ (?=\S)/, "");
  return marked.replace(/ /g, "␣").replace(/\n/g, "↵").replace(/\t/g, "⇥");
}

function newRoot(prompt) {
  return { id: eot, parent: null, children: [], last: null, rest: [], text: "", prompt };
}

/** The child of `parent` for what the engine says of a token; an existing one is kept. */
function addChild(parent, token) {
  let node = parent.children.find((child) => child.id === token.id);
  if (!node) {
    node = { id: token.id, parent, children: [], last: null, token, span: document.createElement("span") };
    // style.css shows "the end", so that it is not copied with the text
    Object.assign(node, node.id === eot ? { text: "", rest: [] } : decode(parent.rest, tokens[node.id]));
    const [, space, word] = node.text.match(/^(\s*)([^]*)$/); // shades and underlines leave out the space
    node.span.append(space, element("span", word));
    node.span.node = node;
    node.span.classList.toggle("end", node.id === eot);
    node.span.classList.toggle("given", token.given);
    node.span.classList.toggle("copied", token.copied > 0.5 && node.id !== eot);
    node.span.style.setProperty("--surprise", (0.5 * Math.min(1, token.bits / SURPRISE)).toFixed(3));
    parent.children.push(node);
    if (parent.children.length > 1) for (const child of parent.children) child.span.classList.add("fork");
  }
  parent.last = node;
  return node;
}

function path(node) {
  const nodes = [];
  for (; node.parent; node = node.parent) nodes.push(node);
  return nodes.reverse();
}

const ids = (node) => [eot, ...path(node).map((each) => each.id)];
const leaves = (node) => (node.children.length ? node.children.flatMap(leaves) : [node]);

/** The leaf that was last written below a token. */
function leafBelow(node) {
  while (node.last) node = node.last;
  return node;
}

// ---------------------------------------------------------------------------------------------------------
// Rendering

function render() {
  $("story").replaceChildren(...path(tip).map((node) => node.span));
  const all = leaves(root);
  $("branches").replaceChildren(...(all.length < 2 ? [] : all.map((leaf, i) => {
    const button = document.createElement("button");
    let fork = leaf; // the token at which this branch leaves the others
    while (fork.parent.children.length < 2) fork = fork.parent;
    button.type = "button";
    const text = path(leaf).slice(path(fork).length - 1).map((node) => node.text).join("").trim();
    button.textContent = `${i + 1} ${text.slice(0, 24) || "the end"}`;
    button.setAttribute("aria-pressed", leaf === leafBelow(tip));
    button.onclick = () => show(leaf);
    return button;
  })));
  update();
}

/** On toystories: say whether the story is valid, and mark the first word that no valid story has there. */
function verdict() {
  if (!model.grammar || tip === root) return "";
  const nodes = path(tip), ended = tip.id === eot, story = nodes.filter((node) => node.id !== eot);
  for (const node of nodes) node.span.classList.remove("wrong");
  const text = story.map((node) => node.text).join("");
  const { ok, reach } = checkToystory(model.grammar, text.trim());
  if (ok) return " · a valid story";
  const at = reach + text.length - text.trimStart().length;
  if (at >= text.trimEnd().length) return ended ? " · unfinished" : " · valid so far";
  const start = text.slice(0, at + 1).search(/\S+\s*$/);
  const end = start + text.slice(start).match(/\S+/)[0].length;
  let seen = 0;
  for (const node of story) {
    const begins = seen + node.text.search(/\S|$/);
    seen += node.text.length;
    if (begins >= end || seen <= start || begins === seen) continue;
    if (node.token.given) return " · no toystory begins like this";
    node.span.classList.add("wrong");
  }
  return ` · “${text.slice(start, end)}” breaks a rule`;
}

/** Which buttons can be used. */
function update() {
  const ended = tip.id === eot && tip !== root && $("prompt").value === root.prompt;
  $("go").disabled = $("another").disabled = running;
  $("stop").disabled = !running;
  $("step").disabled = $("continue").disabled = running || ended;
  $("undo").disabled = running || !undos.length;
  $("story").classList.toggle("writing", running);
}

function status(text) {
  $("status").textContent = text;
}

/** Go to another token of the tree. */
function show(node) {
  hide();
  remember();
  tip = node;
  render();
  status(`${path(tip).length} tokens${verdict()}`);
}

function remember() {
  undos.push([root, tip]);
}

// ---------------------------------------------------------------------------------------------------------
// Writing

const blob = new Blob([$("engine").textContent], { type: "text/javascript" });
const worker = new Worker(URL.createObjectURL(blob));
worker.onerror = (event) => status(`This browser cannot run the model: ${event.message ?? "no Worker"}`);
worker.postMessage({ file: { ...model, weights: $("weights").textContent } });
$("weights").remove(); // the Worker has its own copy

let job = 0, written = 0;

/** Ask the engine to continue after `from`: with a prompt or given ids, then up to `count` tokens. */
function write(from, request) {
  if (!$("seed").reportValidity()) return;
  hide();
  remember();
  if (!from.parent) root = from;
  tip = from;
  running = true;
  written = 0;
  status("Writing …");
  render();
  const settings = { temperature: +$("temperature").value, top_p: +$("top_p").value, seed: +$("seed").value };
  worker.postMessage({ job: ++job, history: ids(from), ...request, ...settings });
}

worker.onmessage = ({ data }) => {
  if (data.ready) {
    root = tip = newRoot("");
    status("Ready");
    return update();
  }
  if (data.job !== job || !running) return; // stopped
  for (const token of data.tokens ?? []) {
    tip = addChild(tip, token);
    $("story").append(tip.span);
    written += !token.given;
  }
  if (data.error) status(`Error: ${data.error}`);
  if (!data.done) return;
  running = false;
  render();
  if (data.error) return;
  const speed = written > 20 ? ` · ${Math.round(written / data.seconds)} tokens/s` : "";
  const dropped = data.dropped ? ` · the first ${data.dropped} of the beginning did not fit` : "";
  status(`${path(tip).length} tokens${speed}${verdict()}${dropped}`);
};

function stop() {
  if (!running) return;
  worker.postMessage({ stop: true });
  running = false;
  render();
  status(`Stopped after ${path(tip).length} tokens${verdict()}`);
}

/** Begin a new story with the prompt. Undo goes back to the one before. */
function begin(count) {
  if (!running) write(newRoot($("prompt").value), { prompt: $("prompt").value, count });
}

/** Continue the story, or begin one if there is none for this prompt. */
function proceed(count) {
  if (tip === root || $("prompt").value !== root.prompt) begin(count);
  else write(tip, { count });
}

/** Continue the story with another token in place of `node`, or go to that branch if it exists. */
function choose(node, id) {
  const existing = node.parent.children.find((child) => child.id === id);
  if (running) stop();
  if (existing) show(leafBelow(existing));
  else write(node.parent, { given: [id], count: MAX_TOKENS });
  $("story").focus({ preventScroll: true });
}

// ---------------------------------------------------------------------------------------------------------
// Alternatives

const percent = (p) => (p >= 0.9995 ? "100%" : p >= 0.0005 ? (100 * p).toFixed(1) + "%" : "<0.1%");

function inspect(node, pin) {
  hide();
  [active, pinned] = [node, pin];
  node.span.classList.add("active");
  const { token } = node, details = $("details"), about = element("p"), table = element("table");
  about.append(element("strong", label(node.id)), ` ${token.bits.toFixed(1)} bits of surprise`);
  const source = token.copied >= 0.01 ? path(tip)[token.from - 1] : null; // token 0 is end-of-text
  if (model.config.pointer) {
    const copied = source ? `copied from the story: ${percent(token.copied)}` : "generated, not copied";
    about.append(element("br"), copied);
  }
  const head = element("tr");
  for (const name of ["Alternatives", "raw", "final"]) {
    head.append(Object.assign(element("th", name), { scope: "col" }));
  }
  table.append(head);
  const listed = token.alternatives.some((entry) => entry.id === token.id);
  const rows = listed ? token.alternatives : [...token.alternatives, token];
  for (const entry of rows) {
    const row = element("tr"), button = element("button", label(entry.id)), cell = element("td");
    button.type = "button";
    button.style.setProperty("--p", `${(100 * entry.raw).toFixed(1)}%`);
    button.onclick = () => (entry.id === node.id ? show(leafBelow(node)) : choose(node, entry.id));
    if (entry.copied > 0.5 && entry.raw > 0.0005) button.append(element("span", " copied", "mark"));
    const written = entry.id !== node.id && node.parent.children.some((child) => child.id === entry.id);
    if (written) button.append(element("span", " branch", "mark"));
    row.className = (entry.id === node.id ? "chosen" : "") + (entry.final ? "" : " cut");
    cell.append(button);
    const final = entry.final ? percent(entry.final) : "cut";
    row.append(cell, element("td", percent(entry.raw)), element("td", final));
    table.append(row);
  }
  details.replaceChildren(about, table);
  details.setAttribute("aria-label", `Alternatives to ${label(node.id)}`);
  details.hidden = false;
  place(node.span, source?.span);
}

/** Put the alternatives below the token, or above it if they do not fit; draw the pointer's line. */
function place(span, source) {
  const details = $("details");
  const word = (span) => span.lastChild.getClientRects()[0] ?? span.getBoundingClientRect();
  if (getComputedStyle(details).position === "fixed") { // on a phone: keep the token above the sheet
    scrollBy(0, Math.max(0, word(span).bottom + 24 - (innerHeight - details.offsetHeight)));
  }
  const page = $("page").getBoundingClientRect(), rect = word(span);
  const above = innerHeight - rect.bottom < details.offsetHeight + 8 && rect.top > details.offsetHeight + 8;
  const left = Math.max(0, Math.min(rect.left - page.left - 12, page.width - details.offsetWidth));
  details.style.left = `${left}px`;
  details.style.top = `${(above ? rect.top - details.offsetHeight - 2 : rect.bottom + 2) - page.top}px`;
  if (!source) return;
  source.classList.add("from");
  const to = word(source), x = rect.left + rect.width / 2 - page.left, y = rect.top - page.top;
  const toX = to.left + to.width / 2 - page.left, toY = to.top - page.top;
  const lift = 18 + Math.min(60, Math.abs(toX - x) / 6);
  const [line, end] = $("line").children;
  line.setAttribute("d", `M${x},${y} C${x},${y - lift} ${toX},${toY - lift} ${toX},${toY - 4}`);
  end.setAttribute("cx", toX);
  end.setAttribute("cy", toY - 4);
  $("line").style.display = "block";
}

function hide() {
  clearTimeout(hiding);
  for (const span of $("story").children) span.classList.remove("active", "from");
  $("details").hidden = true;
  $("line").style.display = "none";
  [active, pinned] = [null, false];
}

/** Hide after a moment, in which the mouse can move from the token to its alternatives. */
function hideSoon() {
  clearTimeout(hiding);
  if (!pinned) hiding = setTimeout(hide, 250);
}

$("story").addEventListener("pointerover", ({ target, pointerType }) => {
  const { node } = target.closest("#story > span") ?? {};
  if (pointerType !== "mouse" || pinned || !node) return;
  clearTimeout(hiding);
  if (node !== active) inspect(node, false);
});
$("story").addEventListener("pointerleave", hideSoon);
$("details").addEventListener("pointerenter", () => clearTimeout(hiding));
$("details").addEventListener("pointerleave", hideSoon);
document.addEventListener("click", ({ target }) => {
  const { node } = target.closest("#story > span") ?? {};
  if (node) inspect(node, true);
  else if (!$("details").contains(target)) hide();
});

// ---------------------------------------------------------------------------------------------------------
// Keyboard and settings

$("story").addEventListener("keydown", (event) => {
  const nodes = path(tip), at = nodes.indexOf(active);
  const forward = getComputedStyle($("story")).direction === "rtl" ? "ArrowLeft" : "ArrowRight";
  let next;
  if (event.key === "Enter" && active) $("details").querySelector("button").focus();
  else if (event.key === "Home") next = 0;
  else if (event.key === "End") next = nodes.length - 1;
  else if (!/Arrow(Left|Right)/.test(event.key)) return;
  else if (at < 0) next = nodes.length - 1;
  else next = at + (event.key === forward ? 1 : -1);
  event.preventDefault();
  if (!nodes[next]) return;
  inspect(nodes[next], true);
  nodes[next].span.scrollIntoView({ block: "nearest" });
});

$("details").addEventListener("keydown", (event) => {
  const move = { ArrowDown: 1, ArrowUp: -1 }[event.key];
  if (!move) return;
  const buttons = [...$("details").querySelectorAll("button")];
  buttons[(buttons.indexOf(document.activeElement) + move + buttons.length) % buttons.length].focus();
  event.preventDefault();
});

document.addEventListener("keydown", ({ key }) => {
  if (key !== "Escape") return;
  if ($("details").contains(document.activeElement)) $("story").focus();
  if (active) hide();
  else stop();
});

$("prompt").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  $("controls").requestSubmit();
});

$("controls").addEventListener("submit", (event) => {
  event.preventDefault();
  begin(MAX_TOKENS);
});
$("prompt").addEventListener("input", update);
$("stop").onclick = stop;
$("step").onclick = () => proceed(1);
$("continue").onclick = () => proceed(MAX_TOKENS);
$("another").onclick = () => {
  $("seed").value = Math.floor(Math.random() * 1e6);
  begin(MAX_TOKENS);
};
$("undo").onclick = () => {
  hide();
  [root, tip] = undos.pop();
  render();
  status(`${path(tip).length} tokens${verdict()}`);
};
$("shade").onchange = () => {
  $("story").classList.toggle("shaded", $("shade").checked);
  document.body.classList.toggle("shaded-page", $("shade").checked);
};
for (const name of ["temperature", "top_p"]) {
  const show = () => ($(name + "-value").value = (+$(name).value).toFixed(2));
  $(name).value = model.sampling[name];
  $(name).oninput = show;
  show();
}
$("seed").value = 1337;
addEventListener("resize", hide);

$("about").textContent = model.about;
$("copied-key").hidden = !model.config.pointer;
for (const [name, text] of Object.entries(model.card)) {
  $("card").append(element("dt", name), element("dd", text));
}
