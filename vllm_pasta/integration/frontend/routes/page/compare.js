/** The two answers, side by side. */

import { Refused, stream } from "./api.js";
import { h } from "./dom.js";
import { diff } from "./diff.js";
import { body, emphasis, path } from "./request.js";

const NOTHING = "Nothing is marked yet. Select some words and press Ctrl+E, or the button Mark.";

/** One answer, or several samples of it, as it comes. */
class Pane {
  constructor(section) {
    this.section = section;
    this.out = section.querySelector(".answers");
    this.figures = section.querySelector(".figures");
    this.clear();
  }

  clear() {
    this.texts = [];
    this.nodes = [];
    this.out.replaceChildren();
    this.figures.textContent = "";
    this.out.classList.remove("old");
  }

  add(index, text, thought) {
    while (this.nodes.length <= index) {
      const node = h("p", { className: "answer", dir: "auto" });
      this.texts.push("");
      this.nodes.push(node);
      this.out.append(node);
    }
    if (thought) {
      const last = this.nodes[index].lastChild;
      if (last?.className === "thought") last.append(thought);
      else this.nodes[index].append(h("span", { className: "thought" }, thought));
    }
    if (text) {
      this.texts[index] += text;
      this.nodes[index].append(text);
    }
  }

  show({ texts, figures, error }) {
    this.clear();
    texts.forEach((text, i) => this.add(i, text || " "));
    this.texts = [...texts];
    if (error) this.fail(error);
    else this.measure(figures);
  }

  measure(figures) {
    if (!figures) return;
    const { first, rate, tokens, stopped } = figures;
    const parts = [`${tokens} tokens`];
    if (rate) parts.unshift(`${rate.toFixed(rate < 10 ? 1 : 0)} tokens/s`);
    if (first !== null) parts.unshift(`first token ${Math.round(first)} ms`);
    if (stopped) parts.push("stopped");
    this.figures.textContent = parts.join(" · ");
  }

  fail(message) {
    this.out.replaceChildren(h("p", { className: "error", role: "alert" }, message));
    this.figures.textContent = "";
  }

  highlight(other) {
    this.nodes.forEach((node, i) => {
      if (i >= other.texts.length || !this.texts[i]) return;
      const [pieces] = diff(this.texts[i], other.texts[i]);
      const thought = node.querySelector(".thought");
      // Words that follow each other and are only here become one piece.
      const groups = [];
      for (const [word, own] of pieces) {
        if (groups.at(-1)?.own === own) groups.at(-1).text += word;
        else groups.push({ own, text: word });
      }
      const made = groups.flatMap(({ own, text }) => {
        if (!own) return [text];
        const [, space, rest] = text.match(/^(\s*)([^]*)$/);
        return rest ? [space, h("mark", { className: "other" }, rest)] : [space];
      });
      node.replaceChildren(...(thought ? [thought] : []), ...made);
    });
  }
}

export class Compare {
  constructor(plain, emphasised) {
    this.panes = { plain: new Pane(plain), emphasised: new Pane(emphasised) };
    this.results = {};
  }

  /** Shows earlier results. */
  show(results) {
    this.stop();
    this.results = results;
    for (const [kind, pane] of Object.entries(this.panes)) {
      if (results[kind]) pane.show(results[kind]);
      else pane.clear();
    }
    this.#highlight();
  }

  stop() {
    this.controller?.abort();
  }

  get isRunning() {
    return this.controller !== undefined && this.controller !== null;
  }

  /**
   * Asks for both answers at once; the plain one is kept where nothing that it depends on changed.
   *
   * @returns `{plain, emphasised}`, each `{texts, figures, error}`; or null where it was superseded.
   */
  async run(state) {
    this.stop();
    const controller = (this.controller = new AbortController());
    const asked = JSON.stringify(body(state, false));
    const before = this.results.plain;
    const kept = before?.asked === asked && !before.error && !before.figures?.stopped ? before : null;
    for (const [kind, pane] of Object.entries(this.panes)) {
      if (kind === "plain" && kept) pane.show(kept);
      else pane.clear();
      pane.section.setAttribute("aria-busy", String(!(kind === "plain" && kept)));
    }
    const one = (kind) => this.#answer(state, kind, controller);
    const [plain, emphasised] = await Promise.all([
      kept ?? one("plain"),
      emphasis(state) ? one("emphasised") : this.#nothing(),
    ]);
    if (this.controller !== controller) return null;
    this.controller = null;
    this.results = { plain: { ...plain, asked }, emphasised };
    this.#highlight();
    return this.results;
  }

  #nothing() {
    const pane = this.panes.emphasised;
    pane.fail(NOTHING);
    pane.section.setAttribute("aria-busy", "false");
    return { texts: [], figures: null, error: NOTHING };
  }

  #highlight() {
    const { plain, emphasised } = this.panes;
    if (!this.results.plain || !this.results.emphasised) return;
    if (this.results.plain.error || this.results.emphasised.error) return;
    plain.highlight(emphasised);
    emphasised.highlight(plain);
  }

  async #answer(state, kind, controller) {
    const pane = this.panes[kind];
    const start = performance.now();
    let first = null;
    let last = start;
    let tokens = 0;
    const figures = (stopped = false) => {
      const seconds = (last - (first ?? start)) / 1000;
      return {
        first: first === null ? null : first - start,
        rate: tokens > 1 && seconds > 0 ? (tokens - 1) / seconds : null,
        tokens,
        stopped,
      };
    };
    let error = null;
    let stopped = false;
    try {
      for await (const chunk of stream(path(state), body(state, kind === "emphasised"), controller.signal)) {
        if (controller !== this.controller) break;
        for (const choice of chunk.choices ?? []) {
          const delta = choice.delta ?? {};
          const text = choice.text ?? delta.content ?? "";
          const thought = delta.reasoning ?? delta.reasoning_content ?? "";
          if (!text && !thought) continue;
          last = performance.now();
          first ??= last;
          tokens += 1;
          pane.add(choice.index, text, thought);
        }
        if (chunk.usage) tokens = chunk.usage.completion_tokens;
        pane.measure(figures());
      }
    } catch (e) {
      if (e.name === "AbortError") stopped = true;
      else error = e instanceof Refused ? e.message : `The answer was cut off: ${e.message}`;
    }
    if (controller !== this.controller && !stopped) return null;
    if (this.controller === controller) {
      pane.section.setAttribute("aria-busy", "false");
      if (error) pane.fail(error);
      else pane.measure(figures(stopped));
    }
    return { texts: [...pane.texts], figures: figures(stopped), error };
  }
}
