
"use strict";
// Texts are set with textContent alone: whatever is in them, they are shown, not read.
const { unit, label, colours, plain, notes, pairs } = JSON.parse(document.getElementById("data").textContent);
const SHOWN = 200;

const counts = new Map();
for (const pair of pairs) counts.set(pair.label, (counts.get(pair.label) || 0) + 1);
const labels = [...counts.keys()].sort((a, b) => counts.get(b) - counts.get(a));
const colour = name => label === null ? plain[0] : Object.hasOwn(colours, name) ? colours[name] : plain[1];
const mi = (pair, side) => pair.numbers[side];
const imbalance = pair => Math.abs(mi(pair, 0) - mi(pair, 1));
const fixed = number => number.toFixed(3);

const ORDERS = {
  "most imbalanced first": (a, b) => imbalance(b) - imbalance(a),
  "least imbalanced first": (a, b) => imbalance(a) - imbalance(b),
  "chosen understood better first": (a, b) => mi(b, 0) - mi(b, 1) - mi(a, 0) + mi(a, 1),
  "rejected understood better first": (a, b) => mi(b, 1) - mi(b, 0) - mi(a, 1) + mi(a, 0),
  "as in the data": (a, b) => a.place - b.place,
};
pairs.forEach((pair, place) => {
  pair.place = place;
  pair.text = [pair.prompt, pair.chosen, pair.rejected].join("\n").toLowerCase();
});

function add(parent, tag, text, properties) {
  const element = parent.appendChild(document.createElement(tag));
  if (text !== undefined) element.textContent = text;
  return Object.assign(element, properties);
}

const about = add(document.body, "ul", undefined, { className: "notes", id: "notes" });
for (const note of notes) add(about, "li", note);

const controls = add(document.body, "div", undefined, { className: "controls" });
const boxes = new Map();
if (label !== null) {
  add(controls, "span", label + ":");
  for (const name of labels) {
    const line = add(controls, "label");
    boxes.set(name, add(line, "input", undefined, { type: "checkbox", checked: true, onchange: update }));
    add(line, "span", undefined, { className: "dot" }).style.background = colour(name);
    add(line, "span", `${name.slice(0, 60)} (${counts.get(name)})`);
  }
}
const ordered = add(add(controls, "label", "sort:"), "select", undefined, { id: "sort", onchange: update });
for (const name of Object.keys(ORDERS)) add(ordered, "option", name);
const sought = add(add(controls, "label", "search:"), "input", undefined, {
  type: "search", id: "search", placeholder: "words in a prompt or response", oninput: update,
});
add(controls, "span", "keys: ↑ ↓ the next pair, / search, Esc all pairs", { className: "keys" });

const columns = add(document.body, "div", undefined, { className: "columns" });
const left = add(columns, "div");
const canvas = add(left, "canvas", undefined, {
  onclick: pick, onmousemove: hover, onmouseleave: leave, id: "scatter",
});
const tip = add(left, "div", undefined, { className: "tip", id: "tip", hidden: true });
left.className = "picture";
canvas.setAttribute("role", "img");
canvas.setAttribute("aria-label", "Mutual information of chosen against rejected responses; the list has the same pairs");
const right = add(columns, "div");
const summary = add(right, "div", undefined, { className: "summary", id: "summary" });
const list = add(right, "div", undefined, { className: "list", id: "list" });
const shown = add(right, "div", undefined, { className: "pair", id: "pair" });

let visible = [], selected = null, limit = SHOWN, points = [];

function update() {
  limit = SHOWN;
  const words = sought.value.toLowerCase().split(/\s+/).filter(word => word);
  visible = pairs.filter(pair => (label === null || boxes.get(pair.label).checked)
    && words.every(word => pair.text.includes(word)));
  visible.sort(ORDERS[ordered.value]);
  if (!visible.includes(selected)) selected = visible[0] || null;
  refresh();
}

function refresh() {
  const better = visible.filter(pair => mi(pair, 0) > mi(pair, 1)).length;
  const worse = visible.filter(pair => mi(pair, 0) < mi(pair, 1)).length;
  const share = count => visible.length ? `${(100 * count / visible.length).toFixed(1)} %` : "none";
  summary.textContent = `${visible.length} pairs: chosen understood better in ${share(better)}, `
    + `rejected in ${share(worse)}. Mutual information in ${unit}.`;
  list.replaceChildren();
  const head = add(list, "div", undefined, { className: "head" });
  for (const words of ["", "chosen", "rejected", "apart", "query"]) add(head, "span", words);
  for (const pair of visible.slice(0, limit)) {
    const line = add(list, "button", undefined, { type: "button", onclick: () => select(pair) });
    line.setAttribute("aria-pressed", pair === selected);
    add(line, "span", undefined, { className: "dot" }).style.background = colour(pair.label);
    for (const number of [mi(pair, 0), mi(pair, 1), imbalance(pair)]) add(line, "span", fixed(number));
    add(line, "span", pair.query);
  }
  if (visible.length > limit) {
    const more = add(list, "button", `${visible.length - limit} more`, { type: "button", className: "more" });
    more.onclick = () => { limit += SHOWN; refresh(); };
  }
  show();
  draw();
}

function select(pair) {
  selected = pair;
  const top = list.scrollTop, at = visible.indexOf(pair);
  refresh();
  list.scrollTop = top;
  if (at >= limit) return; // too far down for the list: it is shown below all the same
  const line = list.children[at + 1], from = line.offsetTop - list.offsetTop;
  if (from < top + 30 || from > top + list.clientHeight - 30) list.scrollTop = from - list.clientHeight / 2;
}

function show() {
  shown.replaceChildren();
  if (selected === null) return;
  const row = selected.row === null ? "" : `, row ${selected.row} of ${selected.set === null ? "the data" : selected.set}`;
  add(shown, "h2", "The prompt, as the model reads it" + row + (label === null ? "" : `, ${label}: ${selected.label}`));
  add(shown, "pre", selected.prompt);
  const answers = add(shown, "div", undefined, { className: "answers" });
  ["chosen", "rejected"].forEach((side, i) => {
    const cell = add(answers, "div");
    add(cell, "h2", `${side}: MI ${fixed(mi(selected, i))}, weight ${fixed(mi(selected, i + 2))}`);
    add(cell, "pre", selected[side], { className: mi(selected, i) > mi(selected, 1 - i) ? "higher" : "" });
  });
}

function scale(size) {
  // the limits of all pairs, so that the picture stands still when some are hidden
  let low = Infinity, high = -Infinity;
  for (const pair of pairs) for (const side of [0, 1]) {
    low = Math.min(low, mi(pair, side));
    high = Math.max(high, mi(pair, side));
  }
  const margin = 0.05 * Math.max(high - low, 1e-3);
  low -= margin;
  high += margin;
  const edge = { left: 58, bottom: 48, band: 62 };
  const span = size - edge.left - edge.band;
  return {
    low, high, span, edge,
    x: value => edge.left + (value - low) / (high - low) * span,
    y: value => size - edge.bottom - (value - low) / (high - low) * span,
  };
}

function ticks(low, high) {
  const raw = (high - low) / 5, power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map(n => n * power).find(n => n >= raw);
  const found = [];
  for (let n = Math.ceil(low / step); n * step <= high; n++) found.push(n * step);
  return found.map(value => [value, value.toFixed(Math.max(0, -Math.floor(Math.log10(step))))]);
}

function draw() {
  const size = canvas.clientWidth, ratio = window.devicePixelRatio || 1;
  canvas.width = canvas.height = size * ratio;
  const pen = canvas.getContext("2d");
  pen.scale(ratio, ratio);
  pen.font = "12px system-ui, 'DejaVu Sans', sans-serif";
  const { low, high, span, edge, x, y } = scale(size);
  for (const [value, words] of ticks(low, high)) {
    pen.strokeStyle = "#e6e6e6";
    pen.beginPath();
    pen.moveTo(x(value), y(low)); pen.lineTo(x(value), y(high));
    pen.moveTo(x(low), y(value)); pen.lineTo(x(high), y(value));
    pen.stroke();
    pen.fillStyle = "#444";
    pen.textAlign = "center"; pen.fillText(words, x(value), y(low) + 16);
    pen.textAlign = "right"; pen.fillText(words, x(low) - 6, y(value) + 4);
  }
  pen.strokeStyle = "#666";
  pen.beginPath();
  pen.moveTo(x(low), y(high)); pen.lineTo(x(low), y(low)); pen.lineTo(x(high), y(low));
  pen.stroke();
  pen.setLineDash([5, 4]); pen.strokeStyle = "#333";
  pen.beginPath(); pen.moveTo(x(low), y(low)); pen.lineTo(x(high), y(high)); pen.stroke();
  pen.setLineDash([]);
  pen.fillStyle = "#222"; pen.textAlign = "center";
  pen.fillText(`MI of chosen, ${unit}`, x((low + high) / 2), y(low) + 38);
  pen.save(); pen.translate(14, y((low + high) / 2)); pen.rotate(-Math.PI / 2);
  pen.fillText(`MI of rejected, ${unit}`, 0, 0); pen.restore();

  const bins = 48, tops = [0, 1].map(() => new Map());
  for (const pair of visible) for (const side of [0, 1]) {
    const bin = Math.min(bins - 1, Math.floor((mi(pair, side) - low) / (high - low) * bins));
    const of = tops[side].get(pair.label) || new Array(bins).fill(0);
    of[bin]++;
    tops[side].set(pair.label, of);
  }
  tops.forEach((of, side) => {
    const sums = new Array(bins).fill(0), at = new Array(bins).fill(0), width = span / bins;
    for (const counts of of.values()) counts.forEach((n, i) => { sums[i] += n; });
    const unitHeight = (edge.band - 16) / Math.max(1, ...sums);
    for (const name of labels) (of.get(name) || []).forEach((n, i) => {
      pen.fillStyle = colour(name);
      const long = n * unitHeight, from = at[i] * unitHeight;
      if (side === 0) pen.fillRect(x(low) + i * width, y(high) - 6 - from - long, width - 1, long);
      else pen.fillRect(x(high) + 6 + from, y(low) - (i + 1) * width, long, width - 1);
      at[i] += n;
    });
  });

  points = visible.map(pair => [x(mi(pair, 0)), y(mi(pair, 1)), pair]);
  const radius = Math.min(4, Math.max(1.5, 80 / Math.sqrt(pairs.length)));
  pen.globalAlpha = 0.65;
  for (const [px, py, pair] of [...points].reverse()) {
    pen.fillStyle = colour(pair.label);
    pen.beginPath(); pen.arc(px, py, radius, 0, 7); pen.fill();
  }
  pen.globalAlpha = 1;
  if (selected !== null) {
    pen.strokeStyle = "#000"; pen.lineWidth = 2;
    pen.beginPath(); pen.arc(x(mi(selected, 0)), y(mi(selected, 1)), radius + 4, 0, 7); pen.stroke();
  }
}

function nearest(event) {
  const far = ([px, py]) => (px - event.offsetX) ** 2 + (py - event.offsetY) ** 2;
  const found = points.reduce((a, b) => (far(b) < far(a) ? b : a), points[0]);
  return found && far(found) < 400 ? found : null;
}

function pick(event) {
  const found = nearest(event);
  if (found) select(found[2]);
}

function hover(event) {
  const found = nearest(event);
  tip.hidden = found === null;
  canvas.style.cursor = found ? "pointer" : "crosshair";
  if (!found) return;
  const [px, py, pair] = found, right = px > canvas.clientWidth / 2;
  tip.textContent = `${label === null ? "" : pair.label.slice(0, 60) + ", "}chosen ${fixed(mi(pair, 0))}, `
    + `rejected ${fixed(mi(pair, 1))}\n${pair.query.slice(0, 160)}`;
  tip.style.top = `${py + 14}px`;
  tip.style.left = right ? "" : `${px}px`;
  tip.style.right = right ? `${canvas.clientWidth - px}px` : "";
}

function leave() { tip.hidden = true; }

function move(by) {
  if (!visible.length) return;
  const at = Math.min(visible.length - 1, Math.max(0, visible.indexOf(selected) + by));
  while (at >= limit) limit += SHOWN;
  select(visible[at]);
}

document.addEventListener("keydown", event => {
  const typing = event.target === sought, choosing = event.target === ordered;
  if (event.ctrlKey || event.altKey || event.metaKey || choosing) return;
  if (event.key === "ArrowDown" || (event.key === "j" && !typing)) move(1);
  else if (event.key === "ArrowUp" || (event.key === "k" && !typing)) move(-1);
  else if (event.key === "/" && !typing) sought.focus();
  else if (event.key === "Escape") { sought.value = ""; sought.blur(); update(); }
  else return;
  event.preventDefault();
});

window.addEventListener("resize", draw);
update();
