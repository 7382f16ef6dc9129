// What one answer was after each of its forwards.

/**
 * A recording of one answer.
 *
 * `segments` are what surrounds it: texts, and the gaps between them with what stood there before
 * (`{text, gap}`); a text that goes on ends in a gap. `messages` are a conversation's.
 * `frames` are changes: after forward `forward` the tokens from number `start` on are `tokens`.
 */
export class Recording {
  constructor({ mode, segments = [], messages = [], settings = {}, chat = false }) {
    Object.assign(this, { mode, segments, messages, settings, chat });
    this.frames = [];
    this.text = ""; // that is decided for good, as the server says it
    this.summary = null;
    this.reason = null; // why it ended
    this._place = 0;
    this._tokens = [];
  }

  /** Take a chunk of the stream; returns the text that it decides. */
  take(chunk) {
    if (chunk.draft) this._add(chunk.draft);
    const choice = chunk.choices?.[0];
    if (!choice) return "";
    const text = (this.chat ? choice.delta?.content : choice.text) ?? "";
    this.text += text;
    if (choice.ar2diff) this.summary = choice.ar2diff;
    if (choice.finish_reason) this.reason = choice.finish_reason;
    return text;
  }

  _add(draft) {
    const last = this.frames.at(-1);
    const frame = { ...draft, refused: draft.refused ?? [] };
    // A reader that lags gets the newest draft only. Its tokens tell what the earlier ones were.
    for (let k = (last?.forward ?? 0) + 1; k < frame.forward; k++) {
      const tokens = asOf(frame.tokens, k, this.mode === "diffusion");
      this.frames.push({ ...frame, tokens, refused: [], forward: k }); // their time is not known
    }
    this.frames.push(frame);
  }

  /** The tokens after the first `count` frames. */
  tokensAfter(count) {
    if (!count && this.frames.length && this.mode === "diffusion")
      return asOf(this.frames[0].tokens, 0, true); // blanks
    if (count < this._place) [this._place, this._tokens] = [0, []];
    for (; this._place < count; this._place++) {
      const { start, tokens } = this.frames[this._place];
      this._tokens.splice(start, Infinity, ...tokens);
    }
    return this._tokens;
  }

  /** How many frames there were when the server's clock stood at a time. */
  framesBy(seconds) {
    const later = this.frames.findIndex((frame) => frame.seconds > seconds);
    return later < 0 ? this.frames.length : later;
  }

  /** The clock after some frames: seconds, forwards and tokens. */
  clockAfter(count) {
    const frame = this.frames[count - 1];
    const tokens = this.tokensAfter(count).filter((token) => token.step > 0).length;
    const whole = count === this.frames.length && this.summary;
    const seconds = whole ? this.summary.seconds : (frame?.seconds ?? 0);
    const forwards = whole ? this.summary.forwards : (frame?.forward ?? 0);
    return { seconds, forwards, tokens };
  }

  /** Whether gaps of a text are filled, and it is not continued. */
  get fills() {
    return this.segments.length > 2;
  }

  /** What stands behind the tokens so far: texts, and gaps that have not been reached. */
  rest(tokens) {
    if (!this.fills) return [];
    let place = this.segments.findIndex(({ gap }) => gap);
    if (!tokens.length) return this.segments.slice(place);
    let given = ""; // behind the gap at `place`
    for (const { state, text } of tokens) {
      if (state === "given") given += text;
      else if (given) [place, given] = [place + 2, ""];
    }
    const [next, ...others] = this.segments.slice(place + 1);
    if (!next) return [];
    // What follows a gap may lack its space, which a later gap's first token has.
    const left = next.text.startsWith(given) ? next.text.slice(given.length) : "";
    return [{ text: left, gap: false }, ...others];
  }

  /** The whole text that was written: with what surrounds its gaps. */
  whole() {
    if (this.chat || this.settings.revise) return this.text;
    return this.segments.map(({ text, gap }) => (gap ? this.text : text)).join("");
  }
}

/** Tokens as they were after an earlier forward. */
function asOf(tokens, forward, blanks) {
  const known = (token) => token.state === "given" || (token.step > 0 && token.step <= forward);
  const first = tokens.findIndex((token) => !known(token));
  if (first < 0) return tokens;
  if (!blanks) return tokens.slice(0, first);
  const next = tokens.findIndex((token, n) => n > first && token.opens);
  const block = next < 0 ? tokens : tokens.slice(0, next);
  const blank = { text: "·", step: 0, p: 1, state: "open" };
  return block.map((token) => (known(token) ? token : { ...blank, opens: token.opens }));
}
