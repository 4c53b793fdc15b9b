"use strict";
// One prompt at every budget, side by side. The lowest budget is asked for first; each request says that it must not be
// lowered, so that what is shown is the budget that stands above it.

const element = (id) => document.getElementById(id);
const cards = [];
let round = null;

function make(name, parent, className = "") {
  const made = document.createElement(name);
  made.className = className;
  parent.append(made);
  return made;
}

function say(card, text, failed = false) {
  card.said.textContent = text;
  card.said.className = failed ? "error" : "";
}

function addCard(entry) {
  const figure = make("figure", element("budgets"));
  figure.dataset.budget = entry.budget;
  const frame = make("div", figure, "frame");
  const caption = make("figcaption", figure);
  make("strong", caption).textContent = entry.budget === "full" ? "full" : `budget ${entry.budget}`;
  make("div", caption).textContent = `${entry.evaluations} evaluations`;
  if (entry.psnr_db !== null) make("div", caption).textContent = `${entry.psnr_db.toFixed(1)} dB to full, measured`;
  cards.push({ budget: entry.budget, frame, said: make("div", caption) });
}

function milliseconds(timing, name) {
  const found = new RegExp(`${name};dur=([0-9.]+)`).exec(timing || "");
  return found ? Number(found[1]) : NaN;
}

async function reason(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `the server answered ${response.status}`;
  }
}

function clear(card) {
  for (const image of card.frame.querySelectorAll("img")) URL.revokeObjectURL(image.src);
  card.frame.replaceChildren();
}

async function draw(card, fields, signal) {
  const query = new URLSearchParams({ ...fields, budget: card.budget, minimum_budget: card.budget });
  const response = await fetch(`picture?${query}`, { signal });
  if (!response.ok) throw new Error(await reason(response));
  const image = new Image();
  image.alt = `${fields.prompt}, budget ${card.budget}`;
  image.src = URL.createObjectURL(await response.blob());
  await image.decode();
  card.frame.replaceChildren(image);
  const seconds = milliseconds(response.headers.get("Server-Timing"), "draw") / 1000;
  say(card, `drawn in ${seconds.toPrecision(2)} s`);
}

async function drawAll(fields) {
  if (round) round.abort();
  round = new AbortController();
  const { signal } = round;
  for (const card of cards) {
    clear(card);
    say(card, "waits …");
  }
  for (const card of cards) {
    say(card, "draws …");
    try {
      await draw(card, fields, signal);
    } catch (error) {
      if (signal.aborted) return;
      say(card, error.message, true);
    }
  }
}

element("form").addEventListener("submit", async (event) => {
  event.preventDefault();
  const fields = Object.fromEntries(new FormData(event.target));
  if (!fields.negative_prompt) delete fields.negative_prompt;
  element("draw").disabled = true;
  await drawAll(fields);
  element("draw").disabled = false;
});

async function start() {
  const response = await fetch("artifact");
  if (!response.ok) throw new Error(await reason(response));
  const artifact = await response.json();
  element("model").textContent = artifact.model;
  document.title = `${artifact.model} – otcache`;
  const frames = artifact.num_frames === null ? "" : `, ${artifact.num_frames} frames`;
  element("about").textContent =
    `One prompt, drawn at every budget: ${artifact.width} × ${artifact.height} pixels${frames}.`;
  element("negative").hidden = !artifact.negative_prompt;
  artifact.budgets.forEach(addCard);
  element("prompt").focus();
}

start().catch((error) => {
  element("error").textContent = error.message;
  element("error").hidden = false;
});
