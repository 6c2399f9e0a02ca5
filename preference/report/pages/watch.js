"use strict";
// Draws what the server tells. Text of runs is only ever set as text, never as markup.
const W = 420, H = 240, LEFT = 52, RIGHT = 10, TOP = 10, BOTTOM = 28;
const byId = id => document.getElementById(id);
const SVG = "http://www.w3.org/2000/svg";
const hidden = new Set();
let state = null;

function node(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children.filter(child => child !== null && child !== undefined));
  return made;
}
function drawn(name, attributes, text) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  return made;
}
function number(value, percent) {
  if (value === null || value === undefined) return "";
  if (percent) return (value * 100).toFixed(value === 0 || Math.abs(value) >= 0.1 ? 0 : 1) + "%";
  const size = Math.abs(value);
  if (size && (size < 1e-3 || size >= 1e6)) return value.toExponential(1);
  return size >= 1000 ? Math.round(value).toLocaleString("en") : String(+value.toPrecision(4));
}
function time(seconds) {
  if (seconds === null || seconds === undefined) return "";
  const s = Math.round(seconds), two = n => String(n).padStart(2, "0");
  return s >= 3600 ? `${Math.floor(s / 3600)}:${two(Math.floor(s / 60) % 60)}:${two(s % 60)}` : `${Math.floor(s / 60)}:${two(s % 60)}`;
}
function ticks(low, high, count) {
  const span = high - low;
  if (!(span > 0)) return [low];
  const power = 10 ** Math.floor(Math.log10(span / count));
  const step = power * [1, 2, 5, 10, 20].find(factor => span / (power * factor) <= count);
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i <= Math.floor(high / step + 1e-9); i++) found.push(i * step);
  return found;
}
const colour = index => `var(--f${index % 6})`;

function card(run, index) {
  const figures = [
    ["loss", number(run.latest?.loss)], ["accuracy", number(run.latest?.["preference/accuracies"], true)],
    ["tokens/s", number(run.latest?.tokens_per_second)], ["MFU", number(run.latest?.mfu, true)],
    ["memory, GiB", number(run.latest?.memory_gib)], ["left", time(run.left)],
  ].filter(([, value]) => value !== "");
  const name = node("b", {class: "name"}, run.name);
  name.style.borderColor = colour(index);
  const done = node("i");
  done.style.width = (run.status === "finished" ? 100 : run.max_steps ? 100 * run.step / run.max_steps : 0) + "%";
  done.style.background = colour(index);
  const box = node("input", {type: "checkbox", id: "show" + index});
  box.checked = !hidden.has(index);
  box.addEventListener("change", () => { box.checked ? hidden.delete(index) : hidden.add(index); draw(); });
  const head = node("div", {}, name, " ", state.runs.length > 1 ? node("label", {class: "quiet"}, box, " show") : "");
  const heard = node("span", {class: "heard", "data-since": run.status === "running" ? run.heard ?? "" : ""});
  const steps = run.max_steps ? `, step ${run.step} of ${run.max_steps}` : "";
  return node("div", {class: "card"}, head,
    node("div", {class: "quiet"}, [run.model, run.loss, run.hardware].filter(Boolean).join(" · ")),
    node("div", {class: "bar"}, done),
    node("div", {class: "quiet"}, run.status + steps, heard),
    node("div", {class: "figures"}, ...figures.map(([label, value]) => node("div", {}, node("span", {class: "quiet"}, label), node("b", {}, value)))),
    run.story ? node("p", {class: "story"}, run.story) : null,
    run.report ? node("a", {href: `/report/${index}`}, "its report") : null);
}

function plot(curve) {
  const lines = [];
  state.runs.forEach((run, index) => {
    const found = run.curves[curve.name];
    if (!found || hidden.has(index)) return;
    const label = state.runs.length > 1 ? run.name + ", " : "";
    if (found.training.length) lines.push({points: found.training, label: label + "training", index});
    for (const [set, points] of Object.entries(found.held_out)) {
      lines.push({points, label: label + set.replace("eval", "held out").replace("_", " "), index, marks: true});
    }
  });
  if (!lines.length) return null;
  const all = lines.flatMap(line => line.points);
  const xs = all.map(point => point[0]), ys = all.map(point => point[1]);
  const least = (a, b) => Math.min(a, b), most = (a, b) => Math.max(a, b);
  const x0 = xs.reduce(least), x1 = xs.reduce(most), low = ys.reduce(least), high = ys.reduce(most);
  const room = (high - low) * 0.06 || Math.abs(high) * 0.1 || 1, y0 = low - room, y1 = high + room;
  const x = value => LEFT + (W - LEFT - RIGHT) * (value - x0) / (x1 - x0 || 1);
  const y = value => H - BOTTOM - (H - TOP - BOTTOM) * (value - y0) / (y1 - y0);
  const svg = drawn("svg", {viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": curve.title});
  for (const value of ticks(y0, y1, 5)) {
    svg.append(drawn("path", {d: `M${LEFT} ${y(value)}H${W - RIGHT}`, stroke: "var(--line)", "stroke-width": 0.6}));
    svg.append(drawn("text", {x: LEFT - 5, y: y(value) + 4, "text-anchor": "end", fill: "var(--ink)"}, number(value, curve.percent)));
  }
  for (const value of ticks(x0, x1, 6).filter(Number.isInteger)) {
    svg.append(drawn("text", {x: x(value), y: H - 10, "text-anchor": "middle", fill: "var(--ink)"}, number(value)));
  }
  for (const line of lines) {
    const d = "M" + line.points.map(point => `${x(point[0]).toFixed(1)} ${y(point[1]).toFixed(1)}`).join("L");
    svg.append(drawn("path", {d, class: "line", fill: "none", stroke: colour(line.index), "stroke-width": line.marks ? 0.9 : 1.6,
      "stroke-dasharray": line.marks ? "4 3" : "none"}));
    if (line.marks || line.points.length === 1) for (const point of line.points) {
      svg.append(drawn("circle", {cx: x(point[0]), cy: y(point[1]), r: 3.5, fill: "var(--card)", stroke: colour(line.index)}));
    }
  }
  svg.addEventListener("pointermove", event => {
    const box = svg.getBoundingClientRect(), at = (event.clientX - box.left) / box.width * W;
    const near = lines.map(line => [line, line.points.reduce((a, b) => Math.abs(x(b[0]) - at) < Math.abs(x(a[0]) - at) ? b : a)]);
    const tip = byId("tip");
    tip.textContent = near.map(([line, point]) => `${line.label}: ${number(point[1], curve.percent)} at step ${point[0]}`).join("\n");
    tip.hidden = false;
    tip.style.left = Math.min(event.clientX + 12, innerWidth - tip.offsetWidth - 8) + "px";
    tip.style.top = event.clientY + 14 + "px";
  });
  svg.addEventListener("pointerleave", () => { byId("tip").hidden = true; });
  return node("figure", {id: "curve-" + curve.name.replace("/", "-")}, node("strong", {}, curve.title), svg);
}

function answers(run, index) {
  return run.answers?.map(asked => node("div", {class: "card"},
    state.runs.length > 1 ? node("div", {class: "quiet"}, run.name) : null,
    node("div", {class: "text", dir: "auto"}, node("b", {}, asked.question)),
    node("div", {class: "given"}, ...asked.given.map(([when, text], i) => node("div", {class: i && i === asked.given.length - 1 ? "new" : ""},
      node("div", {class: "quiet"}, when), node("div", {class: "text", dir: "auto"}, text)))))) ?? [];
}

function data(run) {
  if (!run.data || run.data.read === null || run.data.read === undefined) return null;
  const rows = Object.entries(run.data.dropped).map(([reason, count]) => node("tr", {}, node("td", {}, reason), node("td", {}, number(count))));
  return node("div", {class: "card"}, node("div", {}, `${run.name}: ${number(run.data.read)} rows read, ${number(run.data.kept)} kept`),
    rows.length ? node("table", {}, node("tr", {}, node("th", {}, "dropped because"), node("th", {}, "rows")), ...rows) : null);
}

function draw() {
  if (!state) return;
  const names = state.runs.map(run => run.name), first = state.runs[0];
  byId("title").textContent = names.join(", ");
  document.title = (first.status === "running" && first.max_steps ? `${first.step}/${first.max_steps} ` : "") + names.join(", ");
  byId("runs").replaceChildren(...state.runs.map(card));
  byId("alerts").replaceChildren(...state.runs.flatMap(run => run.alerts.map(([bad, text]) =>
    node("li", {class: bad ? "bad" : ""}, (names.length > 1 ? run.name + ": " : "") + text))));
  byId("curves").replaceChildren(...state.curves.map(plot).filter(Boolean));
  byId("answers").replaceChildren(...state.runs.flatMap(answers));
  byId("data").replaceChildren(...state.runs.map(data).filter(Boolean));
  heard();
}
function heard() {
  for (const place of document.querySelectorAll(".heard")) {
    const age = place.dataset.since ? Math.max(0, Date.now() / 1000 - Number(place.dataset.since)) : null;
    place.textContent = age === null ? "" : `, last heard of ${time(age)} ago`;
  }
}
const events = new EventSource("/events");
events.onopen = () => { byId("link").textContent = "live"; };
events.onerror = () => { byId("link").textContent = "the server is gone; what was last heard stays"; };
events.onmessage = event => { state = JSON.parse(event.data); byId("link").textContent = "live"; draw(); };
setInterval(heard, 1000);
