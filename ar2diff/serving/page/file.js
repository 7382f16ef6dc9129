// A run as a file: saved, and opened again. What a file holds is checked before anything is shown.

import { element } from "./elements.js";
import { isPicture } from "./pictures.js";
import { Recording } from "./recording.js";

const FORMAT = "ar2diff run";
const VERSION = 1;
const MOST = { bytes: 32e6, runs: 8, frames: 100_000, tokens: 2_000_000, text: 1_000_000 };
const STATES = ["decided", "open", "given", "drafted"];
const MODES = ["ar", "speculative", "diffusion"];

/** A file that is not a run, or a damaged one. */
export class Damaged extends Error {}

/** Offer recordings as a download. */
export function save(recordings, model) {
  const runs = recordings.map(({ mode, segments, messages, settings, chat, frames, text, summary, reason }) => ({
    mode, segments, messages, settings, chat, text, summary, reason,
    frames: frames.map(({ start, forward, seconds, tokens, refused }) => ({ start, forward, seconds, tokens, refused })),
  }));
  const blob = new Blob([JSON.stringify({ format: FORMAT, version: VERSION, model, runs }, null, 1)], {
    type: "application/json",
  });
  const href = URL.createObjectURL(blob);
  element("a", { href, download: "ar2diff-run.json" }).click();
  setTimeout(() => URL.revokeObjectURL(href), 60_000);
}

/** The recordings that a file holds. */
export async function open(file) {
  check(file.size <= MOST.bytes, `the file has more than ${MOST.bytes / 1e6} MB`);
  return recordingsOf(await file.text());
}

/** The recordings that a text holds; throws `Damaged`. */
export function recordingsOf(text) {
  let plain;
  try {
    plain = JSON.parse(text);
  } catch {
    throw new Damaged("This file is not JSON.");
  }
  check(plain?.format === FORMAT, "it was not saved by this page");
  check(plain.version === VERSION, `its version is not ${VERSION}`);
  list(plain.runs, "runs", MOST.runs);
  check(plain.runs.length, "it has no runs");
  const left = { tokens: MOST.tokens };
  return plain.runs.map((run, n) => recordingOf(run, `run ${n + 1}`, left));
}

function recordingOf(run, where, left) {
  check(MODES.includes(run?.mode), `${where} has no mode`);
  list(run.segments, `segments of ${where}`, 1000);
  list(run.messages, `messages of ${where}`, 1000);
  list(run.frames, `frames of ${where}`, MOST.frames);
  const segments = run.segments.map((part) => ({ text: string(part?.text, where), gap: part.gap === true }));
  const turns = run.messages.map((part) => ({ role: string(part?.role, where), content: contentOf(part.content, where) }));
  const settings = { revise: Boolean(run.settings?.revise) };
  check(alternate(segments), `the gaps of ${where} do not stand between texts`);
  const made = new Recording({ mode: run.mode, segments, messages: turns, settings, chat: run.chat === true });
  let [count, forward] = [0, 0];
  for (const [n, frame] of run.frames.entries()) {
    made.frames.push(frameOf(frame, `frame ${n + 1} of ${where}`, count, left));
    count = frame.start + frame.tokens.length;
    check(frame.forward >= forward, `frame ${n + 1} of ${where} is out of order`);
    forward = frame.forward;
  }
  made.text = string(run.text, where);
  made.reason = run.reason === null ? null : string(run.reason, where);
  made.summary = run.summary === null ? null : summaryOf(run.summary, where);
  return made;
}

/** What a message says: a text, or pictures and texts. */
function contentOf(content, where) {
  if (!Array.isArray(content)) return string(content, where);
  list(content, `parts of a message of ${where}`, 100);
  return content.map((part) => {
    if (part?.type === "text") return { type: "text", text: string(part.text, where) };
    const url = part?.image_url?.url;
    check(part?.type === "image_url" && typeof url === "string" && isPicture(url), `a picture of ${where} is damaged`);
    return { type: "image_url", image_url: { url } };
  });
}

function frameOf(frame, where, count, left) {
  number(frame?.start, `${where}: start`, count, true);
  number(frame.forward, `${where}: forward`, 1e9, true);
  number(frame.seconds, `${where}: seconds`, 1e9);
  list(frame.tokens, `tokens of ${where}`, left.tokens);
  list(frame.refused, `refused drafts of ${where}`, 10_000);
  left.tokens -= frame.tokens.length;
  const { start, forward, seconds } = frame;
  const refused = frame.refused.map((text) => string(text, where));
  return { start, forward, seconds, refused, tokens: frame.tokens.map((token) => tokenOf(token, where)) };
}

function tokenOf(token, where) {
  check(STATES.includes(token?.state), `a token of ${where} has no state`);
  number(token.step, `a token of ${where}: step`, 1e9, true);
  number(token.p, `a token of ${where}: p`, 1.001);
  const { state, step, p } = token;
  return { text: string(token.text, where), state, step, p, opens: token.opens === true };
}

function summaryOf(summary, where) {
  number(summary?.seconds, `${where}: seconds`, 1e9);
  number(summary.forwards, `${where}: forwards`, 1e9, true);
  const matches = typeof summary.matches === "boolean" ? summary.matches : null;
  return { seconds: summary.seconds, forwards: summary.forwards, matches };
}

/** Whether segments are texts and gaps in turn, beginning with a text. */
const alternate = (segments) => segments.every(({ gap }, n) => gap === (n % 2 === 1));

function check(good, what) {
  if (!good) throw new Damaged(`This file cannot be shown: ${what}.`);
}

function list(value, what, most) {
  check(Array.isArray(value), `the ${what} are no list`);
  check(value.length <= most, `there are too many ${what}`);
}

function number(value, what, most, whole = false) {
  const good = typeof value === "number" && value >= 0 && value <= most;
  check(good && (!whole || Number.isInteger(value)), `${what} is no number that can be`);
}

function string(value, where) {
  check(typeof value === "string" && value.length <= MOST.text, `a text of ${where} is missing or too long`);
  return value;
}
