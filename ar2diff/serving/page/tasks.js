// What each task asks of the server. A plan is a request, and the recording that its answer fills.

import { $ } from "./elements.js";
import { Recording } from "./recording.js";
import { formOf } from "./forms.js";
import { settingsOf } from "./settings.js";

const TEXTS = "/v1/completions";
const CHATS = "/v1/chat/completions";

/** Modes that a task needs one of. */
export const NEEDS = { write: [], rewrite: ["diffusion"], gap: ["diffusion"], compare: [] };

/** What the button that begins a task says. */
export const BUTTONS = { write: "Write", rewrite: "Fill in", gap: "Fill in", compare: "Compare" };

/** The plans of a task; throws `Wrong` if a field is. */
export function plansOf(task, model, messages, marks) {
  if (task === "rewrite") return [rewriting(model, marks)];
  if (task === "gap") return [filling(model)];
  if (task === "compare") return model.modes.toReversed().map((mode) => continuing(model, mode, {}));
  const mode = document.querySelector("[name=mode]:checked").value;
  return [messages ? talking(model, mode, messages) : continuing(model, mode, formOf(false))];
}

function continuing(model, mode, form) {
  const prompt = $("prompt").value;
  const segments = [{ text: prompt, gap: false }, { text: "", gap: true }];
  const settings = { ...settingsOf(mode), ...form };
  return plan(TEXTS, { mode, segments, settings }, { model: model.id, prompt });
}

function talking(model, mode, messages) {
  const settings = { ...settingsOf(mode), ...formOf(true) };
  return plan(CHATS, { mode, messages, settings, chat: true }, { model: model.id, messages });
}

function filling(model) {
  const [prompt, suffix] = [$("prefix").value, $("suffix").value];
  const settings = { ...settingsOf("diffusion"), max_tokens: Number($("length").value) };
  const segments = [
    { text: prompt, gap: false },
    { text: "", gap: true },
    { text: suffix, gap: false },
  ];
  return plan(TEXTS, { mode: "diffusion", segments, settings }, { model: model.id, prompt, suffix });
}

function rewriting(model, marks) {
  const text = $("text").value;
  const { max_tokens: _, ...settings } = settingsOf("diffusion");
  const segments = [];
  let end = 0;
  for (const [from, to] of marks) {
    segments.push({ text: text.slice(end, from), gap: false }, { text: text.slice(from, to), gap: true });
    end = to;
  }
  segments.push({ text: text.slice(end), gap: false });
  // The server counts characters; a script counts some of them twice.
  const characters = (place) => [...text.slice(0, place)].length;
  settings.revise = marks.map((mark) => mark.map(characters));
  return plan(TEXTS, { mode: "diffusion", segments, settings }, { model: model.id, prompt: text });
}

function plan(path, recorded, request) {
  return { path, recording: new Recording(recorded), body: { ...request, ...recorded.settings } };
}
