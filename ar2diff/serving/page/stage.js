// Draws one recording: what was given, its tokens, and its clock.

import { duration, element } from "./elements.js";
import { shown } from "./pictures.js";

export const MODES = { diffusion: "Diffusion", speculative: "Lossless", ar: "AR" };
const SPEAKERS = { user: "You", assistant: "The model" };
const SURE = [0.5, 0.7, 0.9, 0.99]; // where the shades of confidence begin

/** The shade of a probability, from 0 to 4. */
export const shade = (p) => SURE.filter((bound) => p >= bound).length;

export class Stage {
  /** `apart`: what was asked is shown elsewhere. */
  constructor(recording, apart) {
    this.recording = recording;
    this.drawn = []; // tokens, and their elements
    this.pieces = [];
    this.new = [];
    this.tokens = element("span", { className: "tokens" });
    this.rest = element("span", { className: "rest" });
    this.text = element("p", { className: "text" });
    this.text.append(...(apart ? [] : this._before()), this.tokens, this.rest);
    this.clock = element("dl", { className: "clock" });
    this.bar = element("progress", { max: 1, ariaHidden: "true" }); // the clock tells it in words
    this.note = element("p", { className: "hint note" });
    const name = element("h3", {}, MODES[recording.mode] ?? recording.mode);
    const said = ({ role, content }) =>
      element("p", { className: "turn" }, element("b", {}, SPEAKERS[role] ?? role), ...shown(content));
    const turns = recording.messages.map(said);
    if (recording.chat) turns.push(element("p", { className: "speaker" }, SPEAKERS.assistant));
    this.node = element("article", { className: "run", data: { mode: recording.mode } });
    this.node.append(this.bar, name, ...turns, this.text, this.note, this.clock);
  }

  _before() {
    const gap = this.recording.segments.findIndex((segment) => segment.gap);
    const before = this.recording.segments.slice(0, gap < 0 ? undefined : gap);
    return before.map(({ text }) => element("span", { className: "given" }, text));
  }

  /** Show the recording after some of its frames. */
  draw(count) {
    const { recording } = this;
    const frame = recording.frames[count - 1];
    const tokens = recording.tokensAfter(count);
    let same = 0;
    while (same < this.drawn.length && this.drawn[same] === tokens[same]) same++;
    for (const piece of this.pieces.splice(same)) piece.remove();
    this.drawn = [...tokens];
    const added = tokens.slice(same).map((token, n) => pieceOf(token, this._spaced(same + n)));
    this.pieces.push(...added);
    this.tokens.querySelectorAll("del").forEach((refused) => refused.remove());
    this.tokens.append(...added);
    // Of a text that is finished, what the last forward drafted behind its end is of no interest.
    const refused = this._over(count) ? [] : (frame?.refused ?? []);
    for (const text of refused) this.tokens.append(element("del", { className: "refused" }, text));
    this._mark(tokens, frame?.forward);
    this.rest.replaceChildren(...recording.rest(tokens).map(restOf));
    this._tell(count);
  }

  /** Whether the space that a gap's first token begins with stands before the gap already. */
  _spaced(number) {
    const { fills, segments } = this.recording;
    const [last, token] = number ? this.drawn.slice(number - 1, number + 1) : [, this.drawn[0]];
    if (!fills || token.state === "given" || (last && last.state !== "given")) return false;
    const before = last ? last.text : segments[segments.findIndex(({ gap }) => gap) - 1].text;
    return before.endsWith(" ");
  }

  _mark(tokens, forward) {
    for (const { box } of this.new) box.classList.remove("fresh");
    this.new = this.pieces.filter((_, n) => forward && tokens[n].step === forward);
    for (const { box } of this.new) box.classList.add("fresh");
  }

  _tell(count) {
    const { recording } = this;
    const { seconds, forwards, tokens } = recording.clockAfter(count);
    const rate = forwards ? (tokens / forwards).toFixed(2) : "–";
    const told = [
      [duration(seconds), "on the server"],
      [forwards, forwards === 1 ? "forward" : "forwards"],
      [tokens, tokens === 1 ? "token" : "tokens"],
      [rate, "tokens a forward"],
    ];
    this.clock.replaceChildren(
      ...told.map(([value, name]) =>
        element("div", {}, element("dt", {}, name), element("dd", {}, String(value))),
      ),
    );
    const last = recording.frames.at(-1);
    this.bar.value = last ? tokens / (last.start + last.tokens.length || 1) : 0;
    this.note.textContent = this._over(count) ? this._ending() : "";
  }

  /** Whether all frames are shown, and no more will come. */
  _over(count) {
    return Boolean(this.recording.reason) && count === this.recording.frames.length;
  }

  _ending() {
    const { fills, reason, summary } = this.recording;
    const ends = { length: fills ? "" : "It stopped at the limit of tokens.", stopped: "Stopped." };
    const held = summary?.matches === true ? "It has the form that was asked for. " : "";
    const broken = summary?.matches === false ? "It does not have the form that was asked for. " : "";
    return held + broken + (ends[reason] ?? "");
  }
}

/** The element of a token; the space before it stands outside its box. */
function pieceOf(token, spaced) {
  const [space] = token.text.match(/^\s+/) ?? [""];
  const shown = token.text.slice(space.length);
  const box = element("span", { className: `word ${token.state}` }, shown);
  if (token.state === "open") {
    box.className = "slot";
    box.textContent = "";
  } else if (token.state !== "given") {
    box.classList.add(`p${shade(token.p)}`);
    box.dataset.step = token.step;
    box.title = `${Math.round(token.p * 100)} % sure, decided in forward ${token.step}`;
  }
  const line = space.includes("\n");
  if (token.state !== "open" && !shown) box.classList.add(line ? "line" : "empty");
  const piece = element("span", { className: token.opens ? "piece opens" : "piece" }, box);
  // The sign of a line break stands before it.
  if (line && !shown) piece.append(space);
  else if (!spaced) piece.prepend(space);
  return Object.assign(piece, { box });
}

function restOf({ text, gap }) {
  if (!gap) return element("span", { className: "given" }, text);
  return text ? element("mark", {}, text) : element("span", { className: "slot" });
}
