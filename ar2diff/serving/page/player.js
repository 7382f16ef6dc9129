// Plays recordings: the newest forward while they are written, any forward afterwards. One recording
// is played by its forwards; several are played by the server's clock, side by side.

import { $, duration } from "./elements.js";

export const still = matchMedia("(prefers-reduced-motion: reduce)");

export class Player {
  /** `draw` is called with the number of frames of each recording that are to be shown. */
  constructor(draw) {
    Object.assign(this, { draw, recordings: [], times: [], position: 0, live: false });
    this.playing = false;
    this.timer = 0;
    if (still.matches) $("speed").value = "0";
    $("play").addEventListener("click", () => (this.playing ? this.pause() : this.play()));
    $("back").addEventListener("click", () => this.go(this.position - 1));
    $("forth").addEventListener("click", () => this.go(this.position + 1));
    $("slider").addEventListener("input", () => this.go(Number($("slider").value)));
    $("speed").addEventListener("change", () => this.playing && this.play());
  }

  /** Play recordings; `live` ones are being written. */
  load(recordings, live) {
    clearTimeout(this.timer);
    Object.assign(this, { recordings, live, position: 0, timer: 0, playing: true });
    $("player").hidden = false;
    this.grew();
  }

  /** Take notice of frames that have been added. */
  grew() {
    if (this.recordings.length > 1) {
      const times = this.recordings.flatMap(({ frames }) => frames.map((f) => f.seconds));
      this.times = [0, ...new Set(times.sort((a, b) => a - b))];
      if (this.live) this.position = this.last;
    }
    this._show();
    if (this.playing && !this.timer) this._next();
  }

  /** Nothing more will be added. Several recordings are shown again, in step with each other. */
  ended() {
    this.live = false;
    if (this.recordings.length > 1) {
      this.grew();
      if (!still.matches) return this.play();
    }
    this._show();
    if (this.position >= this.last) this.pause();
  }

  /** The last position. */
  get last() {
    const several = this.recordings.length > 1;
    return several ? this.times.length - 1 : (this.recordings[0]?.frames.length ?? 0);
  }

  play() {
    clearTimeout(this.timer);
    if (this.position >= this.last && !this.live) this.position = 0;
    Object.assign(this, { playing: true, timer: 0 });
    this._show();
    this._next();
  }

  pause() {
    clearTimeout(this.timer);
    Object.assign(this, { playing: false, timer: 0 });
    this._show();
  }

  /** Show a position, and stay there. */
  go(position) {
    this.position = Math.min(Math.max(position, 0), this.last);
    this.pause();
  }

  _next() {
    if (this.position >= this.last) {
      if (!this.live) this.pause();
      return;
    }
    this.timer = setTimeout(() => {
      this.timer = 0;
      this.position = Math.min(this.position + 1, this.last);
      this._show();
      this._next();
    }, this._wait());
  }

  /** Milliseconds until the next position. */
  _wait() {
    const pace = Number($("speed").value);
    const time = (position) =>
      this.recordings.length > 1
        ? this.times[position]
        : (this.recordings[0].frames[position - 1]?.seconds ?? 0);
    const real = 1000 * (time(this.position + 1) - time(this.position));
    if (!pace) return this.live ? 0 : real;
    return this.recordings.length > 1 ? real * this._slower(pace) : pace;
  }

  /** By how much several recordings are slowed down, for a forward to take so many ms. */
  _slower(pace) {
    const spans = this.recordings.map(({ frames }) => frames.at(-1)?.seconds / frames.length || 0);
    const longest = Math.max(...spans);
    return longest ? pace / (1000 * longest) : 1;
  }

  _show() {
    const { position, last, recordings } = this;
    const several = recordings.length > 1;
    const time = several ? (this.times[position] ?? 0) : 0;
    const counts = recordings.map((r) => (several ? r.framesBy(time) : position));
    this.draw(counts);
    const slider = $("slider");
    slider.disabled = several && this.live;
    slider.max = last;
    slider.value = position;
    const forward = recordings[0]?.frames[position - 1]?.forward ?? 0;
    const end = recordings[0]?.frames.at(-1)?.forward ?? 0;
    const told = several
      ? `${duration(time)} of ${duration(this.times[last] ?? 0)}`
      : `forward ${forward} of ${end}`;
    slider.setAttribute("aria-valuetext", told);
    $("moment").textContent = told;
    $("play").textContent = this.playing ? "Pause" : "Play";
    $("back").disabled = slider.disabled || position <= 0;
    $("forth").disabled = slider.disabled || position >= last;
  }
}
