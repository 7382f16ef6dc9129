// Reads out the text that is decided for good, some words at a time. Drafts are never read out.

import { $, element } from "./elements.js";

const PAUSE = 1200; // ms, so that a fast model is not read out syllable by syllable

export class Announcer {
  constructor() {
    this.waiting = "";
    this.timer = 0;
  }

  /** Begin a new answer. */
  begin() {
    clearTimeout(this.timer);
    Object.assign(this, { waiting: "", timer: 0 });
    $("said").replaceChildren();
  }

  /** Have a text read out. */
  add(text) {
    this.waiting += text;
    if (this.waiting && !this.timer) this.timer = setTimeout(() => this.end(), PAUSE);
  }

  /** Have what is waiting read out now. */
  end() {
    clearTimeout(this.timer);
    if (this.waiting.trim()) $("said").append(element("p", {}, this.waiting));
    Object.assign(this, { waiting: "", timer: 0 });
  }
}
