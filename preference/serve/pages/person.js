"use strict";
// Shows one question after another and sends back which answer is the best and which the worst. Text of models is only
// ever set as text, never as markup.
const byId = id => document.getElementById(id);
let now = null, best = null;

function node(name, attributes, text) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.textContent = text;
  return made;
}
function draw() {
  const two = now && now.answers.length === 2;
  byId("state").textContent = now ? `question ${now.number}` : "waiting for the next question";
  byId("help").textContent = !now ? "" : two ? "press 1 or 2 for the better one, or click it"
    : best === null ? "press the number of the best answer, or click it" : "and now that of the worst";
  byId("asked").replaceChildren(...(now ? now.asked : []).flatMap(([who, text]) =>
    [node("div", {class: "who"}, who), node("div", {class: "text", dir: "auto"}, text)]));
  byId("answers").replaceChildren(...(now ? now.answers : []).map((text, i) => {
    const card = node("button", {class: i === best ? "answer best" : "answer", type: "button"}, "");
    card.append(node("div", {class: "who"}, `${i + 1}${i === best ? ": the best" : ""}`), node("div", {class: "text", dir: "auto"}, text));
    card.disabled = i === best;
    card.addEventListener("click", () => choose(i));
    return card;
  }));
  byId("undo").hidden = best === null;
  byId("skip").disabled = !now;
}
function choose(i) {
  if (!now || i < 0 || i >= now.answers.length || i === best) return;
  if (now.answers.length === 2) return send({best: i, worst: 1 - i});
  if (best === null) { best = i; return draw(); }
  send({best, worst: i});
}
function undo() { best = null; draw(); }
async function send(verdict) {
  const number = now.number;
  now = best = null;
  draw();
  const body = JSON.stringify({number, ...verdict});
  try {
    await fetch("/verdict", {method: "POST", headers: {"Content-Type": "application/json"}, body});
  } catch { /* the program has ended, as after the last verdict */ }
}
async function stop() {
  if (now) await send({stop: true});
}
async function follow() {
  let after = 0;
  for (;;) {
    let told = null;
    try {
      const answer = await fetch(`/question?after=${after}`);
      told = answer.ok ? await answer.json() : null;
    } catch { /* the program has ended */ }
    if (!told) { now = best = null; draw(); byId("state").textContent = "the program has ended: the page can be closed"; return; }
    if (told.number > after) { now = told; best = null; after = told.number; draw(); }
  }
}
document.addEventListener("keydown", event => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (/^[1-9]$/.test(event.key)) choose(Number(event.key) - 1);
  else if (event.key === "s" && now) send({});
  else if (event.key === "u") undo();
  else if (event.key === "q") stop();
});
byId("skip").addEventListener("click", () => { if (now) send({}); });
byId("undo").addEventListener("click", undo);
byId("stop").addEventListener("click", stop);
draw();
follow();
