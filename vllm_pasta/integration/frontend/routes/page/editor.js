/**
 * A text that can be marked: a textarea over a copy of its text, in which the marks are coloured.
 *
 * So selecting, typing, undoing and reading aloud are the browser's own.
 */

import { announce, h } from "./dom.js";
import { change, edited, toggled, wanted } from "./marks.js";

const WEAKEST = -3; // 10^-3

/** The strength of a mark, for people. */
export const strength = (alpha) => (alpha === 1 ? "full" : `×${Number(alpha.toPrecision(2))}`);

export class Editor {
  /**
   * @param part `{text, marks}`, which the editor changes.
   * @param label What the text is, for people who cannot see where it stands.
   * @param changed Called with "text" or "marks" when they change.
   */
  constructor(part, label, changed, { rows = 2, placeholder = "" } = {}) {
    this.part = part;
    this.label = label;
    this.changed = changed;
    this.tokens = []; // ranges of whole tokens, as the server found them
    this.errors = new Map(); // by mark
    this.area = h("textarea", {
      ariaLabel: label, rows, placeholder, value: part.text, spellcheck: false, dir: "auto",
      oninput: () => this.#typed(),
      onkeydown: (event) => this.#pressed(event),
    });
    this.copy = h("div", { className: "copy", "aria-hidden": "true", dir: "auto" });
    this.list = h("ul", { className: "marks", "aria-label": `Marks in ${label}` });
    this.box = h("div", { className: "editor" }, h("div", { className: "paper" }, this.copy, this.area), this.list);
    this.draw();
  }

  /** Marks the selection, or takes its mark away. */
  toggle() {
    const { text, marks } = this.part;
    const range = wanted(text, this.area.selectionStart, this.area.selectionEnd);
    if (range[0] === range[1]) {
      announce("Nothing to mark here: select some words first");
      return;
    }
    const before = marks.length;
    this.part.marks = toggled(marks, ...range);
    announce(`${this.part.marks.length >= before ? "Marked" : "Not marked"}: ${text.slice(...range)}`);
    this.#update();
  }

  /** Shows which whole tokens the server found: pairs of positions. */
  showTokens(ranges) {
    this.tokens = ranges;
    this.#paint();
  }

  /** Shows what the server said of some marks: a map from a mark's number to a message. */
  showErrors(errors) {
    if (!errors.size && !this.errors.size) return;
    this.errors = errors;
    this.draw();
  }

  draw() {
    this.#paint();
    this.list.replaceChildren(...this.part.marks.map((mark, i) => this.#item(mark, i)));
  }

  #update(what = "marks") {
    this.tokens = [];
    this.errors = new Map();
    this.draw();
    this.changed(what);
  }

  #typed() {
    const { text, marks } = this.part;
    const now = this.area.value;
    this.part.marks = edited(marks, ...change(text, now, this.area.selectionEnd));
    this.part.text = now;
    this.#update("text");
  }

  #pressed(event) {
    if ((event.ctrlKey || event.metaKey) && !event.altKey && event.key.toLowerCase() === "e") {
      event.preventDefault();
      this.toggle();
    }
  }

  #paint() {
    const { text, marks } = this.part;
    const cuts = new Set([0, text.length]);
    for (const { start, end } of marks) cuts.add(start).add(end);
    for (const [start, end] of this.tokens) cuts.add(start).add(end);
    const at = [...cuts].sort((a, b) => a - b);
    const pieces = at.slice(0, -1).map((start, i) => {
      const piece = text.slice(start, at[i + 1]);
      const number = marks.findIndex((m) => m.start <= start && start < m.end);
      if (number >= 0) {
        const wrong = this.errors.has(number) ? " wrong" : "";
        const weak = marks[number].alpha < 1 ? " weak" : "";
        return h("mark", { className: `mark${weak}${wrong}` }, piece);
      }
      const isToken = this.tokens.some(([a, b]) => a <= start && start < b);
      return isToken ? h("mark", { className: "whole" }, piece) : piece;
    });
    // A last line that is empty has no height of its own.
    this.copy.replaceChildren(...pieces, "\n");
  }

  #item(mark, i) {
    const marked = this.part.text.slice(mark.start, mark.end);
    const short = marked.length > 60 ? `${marked.slice(0, 40)} … ${marked.slice(-15)}` : marked;
    const quote = h("q", { className: mark.alpha < 1 ? "weak" : "" }, short);
    const shown = h("output", {}, strength(mark.alpha));
    const slider = h("input", {
      type: "range", min: WEAKEST, max: 0, step: 0.1, value: Math.log10(mark.alpha),
      "aria-label": `Strength of the mark ${short}`, "aria-valuetext": strength(mark.alpha),
      oninput: () => {
        mark.alpha = Number((10 ** Number(slider.value)).toPrecision(2));
        shown.textContent = strength(mark.alpha);
        quote.className = mark.alpha < 1 ? "weak" : "";
        slider.setAttribute("aria-valuetext", strength(mark.alpha));
        this.errors.delete(i);
        this.#paint();
        this.changed("marks");
      },
    });
    const remove = h("button", {
      type: "button", className: "plain", title: "Take this mark away",
      "aria-label": `Take the mark ${short} away`,
      onclick: () => {
        this.part.marks = this.part.marks.filter((other) => other !== mark);
        this.#update();
        this.area.focus();
      },
    }, "✕");
    const error = this.errors.get(i);
    return h("li", { className: error ? "wrong" : "" },
      quote,
      remove,
      h("label", { className: "strength" }, "strength ", slider, shown),
      error ? h("p", { className: "error", role: "alert" }, error) : null);
  }
}
