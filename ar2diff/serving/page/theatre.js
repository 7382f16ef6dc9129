// The right half of the page: recordings, the player, the legend, and what can be done with a run.

import { $, element, say } from "./elements.js";
import { Player, still } from "./player.js";
import { Stage } from "./stage.js";
import { tableOf } from "./table.js";

const AGAIN = "Rewrite parts of it";

export class Theatre {
  constructor() {
    this.stages = [];
    this.recordings = [];
    this.counts = [];
    this.player = new Player((counts) => this._draw(counts));
    $("numbers").addEventListener("change", () => this._number());
    $("table-fold").addEventListener("toggle", () => this._list());
    document.addEventListener("selectionchange", () => this._select());
    this._number();
  }

  /** Show recordings; `live` ones are being written. */
  open(recordings, live) {
    this.recordings = recordings;
    this.chosen = null;
    $("again").textContent = AGAIN;
    const several = recordings.length > 1;
    const asked = recordings.map(({ segments }) => segments[0]?.text ?? "");
    const apart = several && asked.every((text) => text === asked[0]);
    say($("asked"), apart ? asked[0] : "");
    this.stages = recordings.map((recording) => new Stage(recording, apart));
    $("sketch").hidden = true;
    $("runs").replaceChildren(...this.stages.map(({ node }) => node));
    $("runs").classList.toggle("several", several);
    const modes = recordings.map(({ mode }) => mode);
    for (const item of $("legend").querySelectorAll("[data-modes]"))
      item.hidden = !modes.some((mode) => item.dataset.modes.split(" ").includes(mode));
    $("legend").hidden = $("table-fold").hidden = false;
    for (const id of ["again", "further", "save"]) $(id).hidden = true;
    say($("show-problem"), "");
    this.player.load(recordings, live);
    if (!live) this.ended();
  }

  /** Bring the texts into view on a narrow screen, where they stand below the form. */
  appear() {
    const { top } = $("runs").getBoundingClientRect();
    const behavior = still.matches ? "auto" : "smooth";
    if (top > innerHeight * 0.7) $("runs").scrollIntoView({ behavior, block: "start" });
  }

  /** Show what has been added. */
  grew() {
    this.player.grew();
  }

  /** Nothing more will be added; `usable` says whether its text can be rewritten or continued. */
  ended(usable = { rewrite: false, go: false }) {
    const one = this.recordings.length === 1 && this.recordings[0].frames.length > 0;
    this.player.ended();
    $("save").hidden = !this.recordings.some(({ frames }) => frames.length);
    $("again").hidden = !(one && usable.rewrite);
    $("further").hidden = !(one && usable.go);
    this._compare();
  }

  /** Say which of several texts are that of the AR mode. */
  _compare() {
    const ar = this.recordings.find(({ mode, summary }) => mode === "ar" && summary);
    if (!ar || this.recordings.length < 2) return;
    for (const { recording, node } of this.stages) {
      if (recording === ar || !recording.summary) continue;
      const same = recording.whole() === ar.whole();
      const verdict = same ? "The same text as AR." : "Another text than AR.";
      node.querySelector("h3").append(element("small", {}, verdict));
    }
  }

  /** Where the words that are selected in a text begin and end in it; null if none are. */
  selected() {
    const text = this.recordings[0].whole();
    const { words, before } = this.chosen ?? { words: "" };
    if (!words.trim()) return null;
    // What is drawn may differ from the text by a space, or by the name of a token that ends it.
    const places = [...Array(text.length).keys()].filter((n) => text.startsWith(words, n));
    if (!places.length) return null;
    const from = places.reduce((a, b) => (Math.abs(b - before) < Math.abs(a - before) ? b : a));
    return [from, from + words.length];
  }

  _select() {
    const selection = document.getSelection();
    const text = this.stages[0]?.text;
    if (!text?.contains(selection.anchorNode) || !text.contains(selection.focusNode)) return;
    const range = selection.getRangeAt(0);
    const before = document.createRange();
    before.setStart(text, 0);
    before.setEnd(range.startContainer, range.startOffset);
    this.chosen = { words: range.toString(), before: before.toString().length };
    $("again").textContent = this.chosen.words.trim() ? "Rewrite the selected words" : AGAIN;
  }

  _draw(counts) {
    this.counts = counts;
    this.stages.forEach((stage, n) => stage.draw(counts[n]));
    this._list();
  }

  _list() {
    if (!$("table-fold").open) return;
    const shown = this.recordings.map((r, n) => ({ mode: r.mode, tokens: r.tokensAfter(this.counts[n]) }));
    $("table").replaceChildren(...shown.map(tableOf));
  }

  _number() {
    $("runs").classList.toggle("numbered", $("numbers").checked);
  }
}
