/** Which heads are steered: a known set, all of them, or those chosen in a layer × head grid. */

import { announce, byId, h } from "./dom.js";

const MOST_CELLS = 10_000;
const [DEFAULT, ALL, CHOSEN] = ["\0default", "\0all", "\0chosen"];

export class Heads {
  /**
   * @param known The answer of `GET /v1/emphasis/head_sets`.
   * @param changed Called with the heads when the user chooses others: null for the server's
   *   default, a name, or `{layer: [heads]}`; and with the set's own α, if it has one.
   */
  constructor(known, changed) {
    this.known = known;
    this.changed = changed;
    this.layers = known.model.attention_layers;
    this.count = known.model.query_heads; // the most, where layers differ
    this.counts = known.model.query_heads_of_layers;
    this.total = this.layers.reduce((sum, layer) => sum + this.counts[layer], 0);
    this.select = byId("heads");
    this.grid = byId("grid");
    this.select.onchange = () => this.#pick(this.select.value);
    this.grid.onkeydown = (event) => this.#pressed(event);
    this.grid.onclick = (event) => this.#clicked(event.target);
    byId("all-heads").onclick = () => this.#pick(ALL);
    byId("no-heads").onclick = () => this.#choose(new Set());
    this.#options();
    this.#cells();
  }

  /** Shows these heads, without telling anybody. */
  set(heads) {
    this.value = heads;
    this.on = this.#cellsOf(heads);
    this.select.value = heads === null ? DEFAULT
      : typeof heads === "string" ? heads
      : this.on.size === this.total ? ALL : CHOSEN;
    this.#draw();
  }

  /** The heads of a set as `{layer: [heads]}`; of the server's default where none is given. */
  resolved(heads) {
    if (heads === null) return this.known.default?.heads ?? null;
    return typeof heads === "string" ? this.known.head_sets[heads]?.heads ?? null : heads;
  }

  /** How many heads, and which, in a few words. */
  describe(heads) {
    const name = typeof heads === "string" ? heads : heads === null ? "the server's" : "chosen";
    return `${this.#cellsOf(heads).size} heads (${name})`;
  }

  get hasDefault() {
    return this.known.default !== null;
  }

  #options() {
    const { default: own, head_sets: sets } = this.known;
    const option = (value, text, disabled = false) => h("option", { value, disabled }, text);
    this.select.replaceChildren(
      option(DEFAULT, own ? `The server's default: ${own.name || "unnamed"}, ${own.count} heads`
        : "The server has no default: choose some", !own),
      ...Object.entries(sets).map(([name, set]) => option(name, `${name}, ${set.count} heads`)),
      option(ALL, `All ${this.total} heads`),
      option(CHOSEN, "Chosen in the grid"),
    );
  }

  #pick(choice) {
    if (choice === CHOSEN) {
      byId("grid-box").open = true;
      this.#choose(new Set(this.on));
      return;
    }
    if (choice === ALL) {
      this.#choose(new Set(this.layers.flatMap((layer) => this.#row(layer))));
      return;
    }
    const heads = choice === DEFAULT ? null : choice;
    this.set(heads);
    const set = heads === null ? this.known.default : this.known.head_sets[heads];
    this.changed(heads, set?.alpha);
  }

  #choose(on) {
    const heads = {};
    for (const layer of this.layers) {
      const of = [...Array(this.counts[layer]).keys()].filter((head) => on.has(`${layer}.${head}`));
      if (of.length) heads[layer] = of;
    }
    this.set(heads);
    announce(`${on.size} heads`);
    this.changed(heads);
  }

  #row(layer) {
    return [...Array(this.counts[layer]).keys()].map((head) => `${layer}.${head}`);
  }

  #cellsOf(heads) {
    const of = this.resolved(heads) ?? {};
    return new Set(Object.entries(of).flatMap(([layer, l]) => l.map((head) => `${layer}.${head}`)));
  }

  #cells() {
    if (this.total > MOST_CELLS) {
      byId("grid-box").hidden = true;
      return;
    }
    const heading = h("div", { role: "row", className: "row" },
      h("span", { role: "columnheader", className: "corner" }, "layer"),
      ...[...Array(this.count).keys()].map((head) => h("span", { role: "columnheader" }, String(head))));
    const rows = this.layers.map((layer) => h("div", { role: "row", className: "row" },
      h("span", { role: "rowheader", tabIndex: -1, title: `The whole of layer ${layer}`,
        "data-layer": layer }, String(layer)),
      ...this.#row(layer).map((cell) => h("button", { type: "button", role: "gridcell", tabIndex: -1,
        "data-cell": cell, "aria-label": `layer ${layer}, head ${cell.split(".")[1]}` }))));
    this.grid.replaceChildren(heading, ...rows);
    this.grid.querySelector("[data-cell]").tabIndex = 0;
  }

  #draw() {
    const scores = this.#scores();
    for (const cell of this.grid.querySelectorAll("[data-cell]")) {
      const name = cell.dataset.cell;
      const score = scores?.by.get(name);
      cell.setAttribute("aria-selected", String(this.on.has(name)));
      cell.style.setProperty("--score", score === undefined ? 0 : Math.max(0, score / scores.most));
      cell.title = `layer ${name.replace(".", ", head ")}` +
        (score === undefined ? "" : `: ${score >= 0 ? "+" : ""}${score.toFixed(3)} ${scores.objective}`);
    }
    byId("scores").textContent = scores
      ? `The more colour, the more that head helps alone: ${scores.objective} on the task ${scores.task}.`
      : "This choice has no scores of single heads.";
    byId("head-count").textContent = `${this.on.size} of ${this.total}`;
  }

  /** What each head does alone to its profile's first task, if the set was found by a profile. */
  #scores() {
    const set = this.value === null ? this.known.default
      : typeof this.value === "string" ? this.known.head_sets[this.value] : null;
    const [task, profile] = Object.entries(set?.provenance?.profiles ?? {})[0] ?? [];
    if (!profile?.ranking || !profile?.scores) return null;
    const by = new Map(profile.ranking
      .map((name, i) => [name, profile.scores[i] - profile.plain])
      .filter(([, score]) => Number.isFinite(score)));
    const most = Math.max(...by.values(), 1e-9);
    return { task, objective: profile.objective, by, most };
  }

  #clicked(target) {
    const { cell, layer } = target.dataset;
    const names = cell ? [cell] : layer !== undefined ? this.#row(layer) : [];
    if (!names.length) return;
    const on = new Set(this.on);
    const remove = names.every((name) => on.has(name));
    for (const name of names) remove ? on.delete(name) : on.add(name);
    this.#choose(on);
    this.#focus(target);
  }

  #pressed(event) {
    const steps = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
    const step = steps[event.key];
    if ("layer" in event.target.dataset && ["Enter", " "].includes(event.key)) {
      event.preventDefault();
      this.#clicked(event.target);
    }
    if (!step) return;
    event.preventDefault();
    const rows = [...this.grid.children].slice(1).map((row) => [...row.children]);
    const row = rows.findIndex((cells) => cells.includes(event.target));
    const column = rows[row]?.indexOf(event.target) ?? 0;
    this.#focus(rows[row + step[0]]?.[column + step[1]]);
  }

  #focus(cell) {
    if (!cell) return;
    for (const other of this.grid.querySelectorAll("[tabindex='0']")) other.tabIndex = -1;
    cell.tabIndex = 0;
    cell.focus();
  }
}
