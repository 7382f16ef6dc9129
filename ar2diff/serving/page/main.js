// Puts the page together: the server's model, the tasks, and what happens when one is begun.

import { Announcer } from "./announcer.js";
import { chunks, model as askModel, Refused, useKey } from "./client.js";
import { $, say } from "./elements.js";
import { Damaged, open, save } from "./file.js";
import { watchForms } from "./forms.js";
import { Marks } from "./marks.js";
import { Pictures } from "./pictures.js";
import { clearProblems, showProblem, Wrong } from "./settings.js";
import { BUTTONS, NEEDS, plansOf } from "./tasks.js";
import { Theatre } from "./theatre.js";

const announcer = new Announcer();
const theatre = new Theatre();
const marks = new Marks();
const pictures = new Pictures();
let model = null; // of the server
let task = "write";
let talk = []; // the conversation so far
let running = null; // what aborts the requests that are on their way

// The server's model

async function meet() {
  try {
    model = await askModel();
  } catch (error) {
    if (error.status === 401) return askForKey(error.message);
    say($("outage"), `${error.message} Runs that were saved can be opened all the same.`);
    $("run").disabled = true;
    return;
  }
  say($("outage"), "");
  $("run").disabled = false;
  $("key-field").hidden = true;
  const known = ["diffusion", "speculative", "ar"].filter((mode) => model.modes?.includes(mode));
  model.modes = known.length ? known : ["ar"];
  const blocks = model.block_length ? `blocks of ${model.block_length}` : "no blocks";
  const sees = model.images ? "sees pictures" : "";
  $("facts").textContent = [model.id, model.attention, blocks, sees].filter(Boolean).join(" · ");
  for (const label of $("modes").querySelectorAll("[data-mode]"))
    label.hidden = !model.modes.includes(label.dataset.mode);
  document.querySelector(`[name=mode][value=${model.modes[0]}]`).checked = true;
  for (const tab of tabs) tab.hidden = !offered(tab.dataset.task);
  $("form-fold").dataset.lacking = model.constraints ? "" : "yes";
  const chat = Boolean(model.chat);
  $("kinds").dataset.lacking = chat ? "" : "yes";
  document.querySelector(`[name=kind][value=${chat ? "chat" : "text"}]`).checked = true;
  if (chat) $("prompt").value = "Zoe had 3 pencils and found 5 more. She gave 4 to Finn. How many are left?";
  for (const name of ["max_tokens", "length"]) {
    if (model.max_tokens) $(name).max = model.max_tokens;
    if (model.max_tokens < $(name).value) $(name).value = model.max_tokens;
  }
  choose(offered(task) ? task : "write");
}

function offered(name) {
  if (name === "compare") return model.modes.length > 1;
  return NEEDS[name].every((mode) => model.modes.includes(mode));
}

function askForKey(message) {
  $("key-field").hidden = false;
  say($("form-problem"), message);
  $("run").disabled = !model;
  $("key").focus();
}

// Tasks

const tabs = [...$("tabs").children];

function choose(name) {
  task = name;
  for (const tab of tabs) {
    const chosen = tab.dataset.task === name;
    tab.setAttribute("aria-selected", String(chosen));
    tab.tabIndex = chosen ? 0 : -1;
    if (chosen) $("task").setAttribute("aria-labelledby", tab.id);
  }
  const talking = name === "write" && chatting();
  for (const part of $("form").querySelectorAll("[data-tasks]"))
    part.hidden = part.dataset.lacking === "yes" || !part.dataset.tasks.split(" ").includes(name);
  $("prompt-label").textContent = talking ? "Your message" : "How the text begins";
  $("pictures-field").hidden = !(talking && model?.images);
  $("fresh").hidden = !(talking && talk.length);
  const mode = document.querySelector("[name=mode]:checked")?.value;
  const denoises = name === "write" ? mode === "diffusion" : true;
  $("threshold-field").hidden = $("threshold-hint").hidden = !denoises;
  if (!running) $("run").textContent = BUTTONS[name];
  $("sketch-button").textContent = BUTTONS[name];
  clearProblems();
}

function chatting() {
  return document.querySelector("[name=kind]:checked")?.value === "chat";
}

$("tabs").addEventListener("click", ({ target }) => target.dataset.task && choose(target.dataset.task));
$("tabs").addEventListener("keydown", (event) => {
  const shown = tabs.filter((tab) => !tab.hidden);
  const here = shown.indexOf(document.activeElement);
  const ways = { ArrowRight: here + 1, ArrowLeft: here - 1, Home: 0, End: shown.length - 1 };
  if (here < 0 || !(event.key in ways)) return;
  event.preventDefault();
  const next = shown.at(ways[event.key] % shown.length);
  choose(next.dataset.task);
  next.focus();
});
$("modes").addEventListener("change", () => choose(task));
$("kinds").addEventListener("change", () => choose(task));
watchForms();

// Runs

async function run() {
  if (running) return;
  clearProblems();
  let plans;
  try {
    if (task === "rewrite" && !marks.spans.length && !marks.openSelection())
      throw new Wrong("revise", "Select the words that are to be written anew.");
    const told = pictures.content($("prompt").value);
    const asked = [...talk, { role: "user", content: told }];
    plans = plansOf(task, model, task === "write" && chatting() ? asked : null, marks.spans);
  } catch (error) {
    if (!(error instanceof Wrong)) throw error;
    return showProblem(error.message, error.param);
  }
  const recordings = plans.map(({ recording }) => recording);
  running = new AbortController();
  busy(true);
  const together = document.querySelector("[name=order]:checked").value === "together";
  try {
    if (together) await Promise.all(plans.map((plan) => fill(plan, recordings)));
    else for (const plan of plans) await fill(plan, recordings);
    if (plans[0].recording.chat) remember(plans[0].recording);
  } catch (error) {
    running.abort(); // the others, too
    for (const recording of recordings) recording.reason ??= "stopped";
    if (error.name !== "AbortError") complain(error);
  }
  running = null;
  busy(false);
  if (theatre.recordings !== recordings) return; // it was refused
  announcer.end();
  const chat = plans[0].recording.chat;
  theatre.ended({ rewrite: offered("rewrite") && !chat, go: !chat });
}

/** Fill the recording of a plan. What was shown before stays until the server answers. */
async function fill({ path, body, recording }, recordings) {
  for await (const chunk of chunks(path, body, running.signal)) {
    if (theatre.recordings !== recordings) {
      announcer.begin();
      theatre.open(recordings, true);
      theatre.appear();
    }
    const text = recording.take(chunk);
    if (recording === recordings[0]) announcer.add(text);
    theatre.grew();
  }
}

function remember({ messages, text }) {
  talk = [...messages, { role: "assistant", content: text }];
  $("prompt").value = "";
  pictures.clear();
  $("prompt").focus();
  choose(task);
}

function complain(error) {
  if (!(error instanceof Refused)) console.error(error);
  if (error.status === 401) return askForKey(error.message);
  showProblem(error.message, error.param);
}

function busy(yes) {
  $("run").disabled = yes;
  $("run").textContent = yes ? "Writing…" : BUTTONS[task];
  $("stop").disabled = !yes;
  $("runs").setAttribute("aria-busy", String(yes));
}

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  if (model) run();
});
$("stop").addEventListener("click", () => running?.abort());
$("fresh").addEventListener("click", () => {
  talk = [];
  pictures.clear();
  $("runs").replaceChildren();
  choose(task);
  $("prompt").focus();
});
$("use-key").addEventListener("click", () => {
  useKey($("key").value);
  $("key").value = "";
  clearProblems();
  meet();
});
$("key").addEventListener("keydown", (event) => {
  if (event.key !== "Enter") return;
  event.preventDefault();
  $("use-key").click();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") running?.abort();
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("form").requestSubmit();
});

// What becomes of a run

$("again").addEventListener("click", () => {
  const text = theatre.recordings[0].whole();
  const chosen = theatre.selected();
  $("text").value = text;
  marks.clear();
  if (chosen) marks.add(...chosen);
  choose("rewrite");
  $("text").focus();
});
$("further").addEventListener("click", () => {
  $("prompt").value = theatre.recordings[0].whole();
  document.querySelector("[name=kind][value=text]").checked = true;
  choose("write");
  $("prompt").focus();
});
$("save").addEventListener("click", () => save(theatre.recordings, model?.id ?? ""));
$("open").addEventListener("click", () => $("file").click());
$("file").addEventListener("change", () => show($("file").files[0]));
document.addEventListener("dragover", (event) => event.preventDefault());
document.addEventListener("drop", (event) => {
  event.preventDefault();
  if (!pictures.takes(event.dataTransfer.files)) show(event.dataTransfer.files[0]);
});

async function show(file) {
  if (!file || running) return;
  try {
    theatre.open(await open(file), false);
  } catch (error) {
    if (!(error instanceof Damaged)) throw error;
    say($("show-problem"), error.message);
  }
  $("file").value = "";
}

meet();
