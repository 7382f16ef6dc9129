// Words of a text that are to be written anew: opened, listed, and closed again.

import { $, element } from "./elements.js";

export class Marks {
  constructor() {
    this.spans = []; // [from, to] of the text, in order
    $("text").addEventListener("input", () => this.clear());
    $("open-selection").addEventListener("click", () => {
      if (!this.openSelection()) $("text").focus();
    });
  }

  /** Open what is selected in the field; returns whether anything is. */
  openSelection() {
    const { selectionStart: from, selectionEnd: to } = $("text");
    if (from === to) return false;
    this.add(from, to);
    $("text").setSelectionRange(to, to);
    return true;
  }

  /** Open a part of the text; it takes in those that it touches. */
  add(from, to) {
    const apart = this.spans.filter(([begin, end]) => end < from || begin > to);
    for (const [begin, end] of this.spans.filter((span) => !apart.includes(span)))
      [from, to] = [Math.min(from, begin), Math.max(to, end)];
    this.spans = [...apart, [from, to]].sort((a, b) => a[0] - b[0]);
    this._show();
  }

  /** Close all parts. */
  clear() {
    this.spans = [];
    this._show();
  }

  _show() {
    const text = $("text").value;
    const items = this.spans.map((span) => {
      const words = text.slice(...span);
      const close = element("button", { type: "button", ariaLabel: `Close: ${words}` }, "×");
      close.addEventListener("click", () => {
        this.spans = this.spans.filter((other) => other !== span);
        this._show();
        $("open-selection").focus();
      });
      return element("li", {}, element("mark", {}, words.trim() || "␣"), close);
    });
    $("marks").replaceChildren(...items);
  }
}
