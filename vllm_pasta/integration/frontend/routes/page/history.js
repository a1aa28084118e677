/** What was asked before, and a state as a link. */

import { h } from "./dom.js";

const STORE = "vllm-pasta-playground";
const MOST = 50;

/** The runs of this page; the starred ones stay in this browser. */
export class History {
  constructor(list, { restore, link }) {
    this.list = list;
    this.restore = restore;
    this.link = link;
    this.runs = this.#load();
    this.draw();
  }

  add(run) {
    this.runs.unshift(run);
    const plain = this.runs.filter((r) => !r.starred);
    this.runs = this.runs.filter((r) => r.starred || plain.indexOf(r) < MOST);
    this.draw();
  }

  draw() {
    const empty = h("li", { className: "empty" }, "Nothing yet. Each run is kept here.");
    this.list.replaceChildren(...(this.runs.length ? this.runs.map((r) => this.#item(r)) : [empty]));
  }

  #item(run) {
    const star = h("button", {
      type: "button", className: "plain star", "aria-pressed": String(Boolean(run.starred)),
      "aria-label": `Keep ${run.title}`, title: "Keep in this browser",
      onclick: () => {
        run.starred = !run.starred;
        star.setAttribute("aria-pressed", String(run.starred));
        star.textContent = run.starred ? "★" : "☆";
        this.#save();
      },
    }, run.starred ? "★" : "☆");
    const answer = run.results.emphasised?.error ?? run.results.emphasised?.texts[0] ?? "";
    return h("li", {}, star,
      h("button", { type: "button", className: "run", onclick: () => this.restore(run) },
        h("span", { className: "what" }, run.title),
        h("span", { className: "how" }, run.how),
        h("span", { className: "said" }, answer.replace(/\s+/g, " ").slice(0, 120))),
      h("button", { type: "button", className: "plain", title: "Copy a link to it",
        "aria-label": `Copy a link to ${run.title}`, onclick: () => this.link(run.state) }, "Link"));
  }

  #load() {
    try {
      const runs = JSON.parse(localStorage.getItem(STORE) ?? "[]");
      return Array.isArray(runs) ? runs : [];
    } catch {
      return [];
    }
  }

  #save() {
    try {
      localStorage.setItem(STORE, JSON.stringify(this.runs.filter((run) => run.starred)));
    } catch {
      // no room, or forbidden: they stay as long as the page
    }
  }
}

/** A state as text for a URL's fragment, which browsers send to no server. */
export async function pack(state) {
  const json = new Blob([JSON.stringify(state)]);
  const bytes = await bytesOf(json.stream().pipeThrough(new CompressionStream("deflate-raw")));
  let text = "";
  for (const byte of bytes) text += String.fromCharCode(byte);
  return btoa(text).replaceAll("+", "-").replaceAll("/", "_").replace(/=+$/, "");
}

/** The state that a fragment holds; null where it holds none. */
export async function unpack(fragment) {
  const match = /^#?s=([\w-]+)$/.exec(fragment);
  if (!match) return null;
  try {
    const text = atob(match[1].replaceAll("-", "+").replaceAll("_", "/"));
    const bytes = Uint8Array.from(text, (c) => c.charCodeAt(0));
    const plain = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate-raw"));
    return JSON.parse(new TextDecoder().decode(await bytesOf(plain)));
  } catch {
    return null;
  }
}

const bytesOf = async (stream) => new Uint8Array(await new Response(stream).arrayBuffer());
