/** The page: what is written, shown, asked and kept, and how the parts act on each other. */

import { ask, hasKey, Refused } from "./api.js";
import { Compare } from "./compare.js";
import { announce, byId, copyText, debounced, h } from "./dom.js";
import { Editor, strength } from "./editor.js";
import { Heads } from "./heads.js";
import { History, pack, unpack } from "./history.js";
import { forget, look } from "./inside.js";
import { code, emphasis, prompt } from "./request.js";
import { example, EXAMPLES, sane, title } from "./state.js";

const MOST_TOKENS_SHOWN = 4000;
const ROLES = ["system", "user", "assistant"];

let state;
let editors = [];
let focused = 0;
let models = [];
let heads;
let past;
let resolving;
let seen = []; // the prompt's tokens
const compare = new Compare(byId("plain"), byId("emphasised"));

// What is written ---------------------------------------------------------------------------------

function drawEditors() {
  const chat = state.mode === "chat";
  byId("add-message").hidden = !chat;
  const texts = chat ? state.messages : [state.raw];
  editors = texts.map((part, i) => {
    const label = chat ? `message ${i + 1}, ${part.role}` : "the prompt";
    const editor = new Editor(part, label, (what) => changed(what), {
      rows: chat && part.role === "system" ? 1 : 3,
      placeholder: chat ? `What the ${part.role} says` : "A prompt, as the model is to see it",
    });
    editor.area.addEventListener("focus", () => (focused = i));
    return editor;
  });
  focused = Math.max(0, Math.min(focused, editors.length - 1));
  byId("editors").replaceChildren(...editors.map((editor, i) =>
    chat ? h("div", { className: "message" }, messageBar(i), editor.box) : editor.box));
}

function messageBar(i) {
  const message = state.messages[i];
  const role = h("select", {
    "aria-label": `Role of message ${i + 1}`,
    onchange: () => {
      message.role = role.value;
      drawEditors();
      changed("text");
    },
  }, ...ROLES.map((name) => h("option", { value: name, selected: name === message.role }, name)));
  const remove = h("button", {
    type: "button", className: "plain", "aria-label": `Remove message ${i + 1}`,
    title: "Remove this message", disabled: state.messages.length === 1,
    onclick: () => {
      state.messages.splice(i, 1);
      drawEditors();
      changed("text");
    },
  }, "✕");
  return h("div", { className: "bar" }, role, remove);
}

function addMessage() {
  const last = state.messages.at(-1).role;
  // An answer that was given goes into the conversation, for the next turn.
  const answer = last === "user" ? compare.results.emphasised?.texts?.[0]?.trim() : "";
  if (answer) state.messages.push({ role: "assistant", text: answer, marks: [] });
  const role = last === "user" && !answer ? "assistant" : "user";
  state.messages.push({ role, text: "", marks: [] });
  drawEditors();
  editors.at(-1).area.focus();
  changed("text");
}

// What the model sees -----------------------------------------------------------------------------

const resolveSoon = debounced(resolve, 150);

async function resolve() {
  resolving?.abort();
  const controller = (resolving = new AbortController());
  const marked = emphasis(state);
  try {
    const { prompts } = await ask("emphasis/resolve?tokens=true", prompt(state), controller.signal);
    if (resolving === controller) showResolved(prompts[0]);
  } catch (e) {
    if (e.name === "AbortError") return;
    await showPlain(controller.signal);
    if (resolving === controller) showRefused(e, marked?.fields ?? new Map());
  }
}

/** Shows the prompt's tokens where its marks were refused; none where the prompt itself was. */
async function showPlain(signal) {
  let plain = { tokens: [], emphasised: [] };
  const { emphasis: marked, ...rest } = prompt(state);
  try {
    if (marked) [plain] = (await ask("emphasis/resolve?tokens=true", rest, signal)).prompts;
  } catch {
    // what was said of the marks is said already
  }
  if (!signal.aborted) showResolved(plain);
}

function showResolved({ tokens, emphasised }) {
  showRefused(null);
  seen = tokens;
  const factors = new Map();
  for (const { tokens: [start, end], alpha } of emphasised) {
    for (let i = start; i < end; i += 1) factors.set(i, alpha ?? 1);
  }
  const span = (text, i) => h(factors.has(i) ? "mark" : "span", {
    className: `token${factors.get(i) < 1 ? " weak" : ""}`,
    title: factors.get(i) < 1 ? `token ${i}, strength ${strength(factors.get(i))}` : `token ${i}`,
  }, text.replaceAll("\n", "⏎\n"));
  const shown = tokens.slice(0, MOST_TOKENS_SHOWN).map(span);
  const more = tokens.length - shown.length;
  byId("tokens").replaceChildren(...shown, ...(more > 0 ? [`… and ${more} more`] : []));
  byId("seen-count").textContent = tokens.length ? `${tokens.length} tokens, ${factors.size} emphasised` : "";
  const texts = emphasised.map(({ tokens: [start, end] }) => tokens.slice(start, end).join(""));
  editors.forEach((editor) => editor.showTokens(wholeTokens(editor.part, texts)));
}

/** Where the emphasised tokens stand in a text: they may begin before a mark, or end after it. */
function wholeTokens({ text, marks }, emphasised) {
  const found = [];
  for (const { start, end } of marks) {
    const marked = text.slice(start, end);
    for (const tokens of emphasised) {
      for (let at = tokens.indexOf(marked); at >= 0; at = tokens.indexOf(marked, at + 1)) {
        const [a, b] = [Math.max(0, start - at), Math.min(text.length, start - at + tokens.length)];
        const offset = a - (start - at);
        if (text.slice(a, b) === tokens.slice(offset, offset + b - a)) found.push([a, b]);
      }
    }
  }
  return found;
}

/** Shows a refusal where it belongs: at the mark, at the heads, or below the text. */
function showRefused(error, fields = new Map()) {
  const message = error?.message ?? "";
  const field = /^(emphasis\.\w+\[\d+\])/.exec(message)?.[1];
  const place = fields.get(field);
  const text = message.replace(/^emphasis\.\w+(\[\d+\])?(\.\w+)?: /, "");
  editors.forEach((editor, part) =>
    editor.showErrors(place?.part === part ? new Map([[place.mark, text]]) : new Map()));
  const knob = place ? null : /^emphasis\.(heads|alpha|share)/.exec(message)?.[1];
  const said = {
    "heads-error": knob === "heads" ? text : "",
    "strength-error": knob && knob !== "heads" ? text : "",
    "prompt-error": place || knob ? "" : message,
  };
  for (const [id, words] of Object.entries(said)) {
    byId(id).textContent = words;
    byId(id).hidden = !words;
  }
}

// The answers -------------------------------------------------------------------------------------

async function run() {
  const asked = structuredClone(state);
  byId("stop").hidden = false;
  announce("Both answers are coming");
  if (byId("compare").getBoundingClientRect().top > innerHeight) byId("compare").scrollIntoView();
  const results = await compare.run(asked);
  if (!results) return; // another run came
  byId("stop").hidden = true;
  ran = true;
  const failed = Object.values(results).filter((result) => result.error).length;
  announce(failed ? "An answer was refused" : "Both answers are there");
  past.add({ title: title(asked), how: how(asked), state: asked, results });
}

let ran = false;
let usualShare = 0.3;
const runSoon = debounced(() => run(), 350);

function how(asked) {
  const clock = new Date().toLocaleTimeString([], { hour: "2-digit", minute: "2-digit" });
  const warm = asked.temperature ? ` · temperature ${asked.temperature}` : "";
  const strength = asked.share === null ? `α ${alphaText(asked.alpha)}` : `share ${asked.share}`;
  return `${strength} · ${heads.describe(asked.heads)}${warm} · ${clock}`;
}

const alphaText = (alpha) => String(Number(alpha.toPrecision(2)));

/** Something changed: a text, the marks, or a knob. */
function changed(what) {
  resolveSoon();
  forget();
  if (what === "text") {
    for (const id of ["plain", "emphasised"]) byId(id).querySelector(".answers").classList.add("old");
  } else if (ran && byId("again").checked) runSoon();
}

// The knobs ---------------------------------------------------------------------------------------

function drawKnobs() {
  const by = state.share === null ? "alpha" : "share";
  document.querySelector(`[name=strength][value=${by}]`).checked = true;
  byId("by-alpha").hidden = by !== "alpha";
  byId("by-share").hidden = by !== "share";
  byId("share").value = state.share ?? usualShare;
  showShare();
  byId("alpha").value = Math.log10(state.alpha);
  showAlpha();
  heads.set(state.heads);
  byId("temperature").value = state.temperature;
  byId("max-tokens").value = state.maxTokens;
  byId("samples").value = state.samples;
  document.querySelector(`[name=mode][value=${state.mode}]`).checked = true;
}

function showAlpha() {
  byId("alpha-shown").textContent = alphaText(state.alpha);
  byId("alpha").setAttribute("aria-valuetext", alphaText(state.alpha));
}

function showShare() {
  const text = `${Math.round(100 * byId("share").valueAsNumber)} %`;
  byId("share-shown").textContent = text;
  byId("share").setAttribute("aria-valuetext", text);
}

function listenToKnobs() {
  for (const radio of document.querySelectorAll("[name=strength]")) {
    radio.onchange = () => {
      state.share = radio.value === "share" ? usualShare : null;
      drawKnobs();
      changed("knob");
    };
  }
  byId("share").oninput = () => {
    state.share = usualShare = byId("share").valueAsNumber;
    showShare();
    changed("knob");
  };
  byId("alpha").oninput = () => {
    state.alpha = Number((10 ** Number(byId("alpha").value)).toPrecision(2));
    showAlpha();
    changed("knob");
  };
  for (const [id, name] of [["temperature", "temperature"], ["max-tokens", "maxTokens"], ["samples", "samples"]]) {
    const input = byId(id);
    input.onchange = () => {
      const value = input.valueAsNumber;
      if (Number.isFinite(value)) state[name] = Math.min(input.max, Math.max(input.min, value));
      input.value = state[name];
      changed("knob");
    };
  }
  for (const radio of document.querySelectorAll("[name=mode]")) {
    radio.onchange = () => {
      state.mode = radio.value;
      focused = 0;
      drawEditors();
      changed("text");
    };
  }
  byId("model").onchange = () => {
    state.model = byId("model").value;
    changed("knob");
  };
}

// Around it ---------------------------------------------------------------------------------------

/** Shows a state: an example's, a link's, or an earlier run's. */
function show(next) {
  state = next;
  focused = 0;
  drawEditors();
  drawKnobs();
  forget();
  resolve();
}

async function copyLink(of) {
  const { model, ...kept } = of;
  const url = new URL(location.href);
  url.hash = `s=${await pack(kept)}`;
  history.replaceState(null, "", url);
  const copied = await copyText(url.href, () => {
    byId("link-text").value = url.href;
    byId("link-dialog").showModal();
    byId("link-text").select();
  });
  if (copied) flash(byId("link"), "Copied");
}

function flash(button, text) {
  const before = [...button.childNodes];
  button.replaceChildren(text);
  setTimeout(() => button.replaceChildren(...before), 1200);
}

function showCode() {
  const kind = document.querySelector("[name=code]:checked").value;
  byId("code").textContent = code(state, {
    url: new URL("v1/", document.baseURI).href,
    hasKey: hasKey(),
    model: models.find(({ id }) => id === state.model)?.root ?? state.model,
    defaultHeads: heads.resolved(null),
  })[kind];
}

const THEMES = { "": ["◐", "as the system"], light: ["☀", "light"], dark: ["☾", "dark"] };

function turnTheme() {
  const names = Object.keys(THEMES);
  const root = document.documentElement;
  const next = names[(names.indexOf(root.dataset.theme ?? "") + 1) % names.length];
  root.dataset.theme = next;
  byId("theme").textContent = THEMES[next][0];
  byId("theme").setAttribute("aria-label", `Colours: ${THEMES[next][1]}`);
}

function listen() {
  listenToKnobs();
  const mark = byId("mark");
  mark.onpointerdown = (event) => event.preventDefault(); // the text keeps its selection
  mark.onclick = () => {
    editors[focused].toggle();
    editors[focused].area.focus();
  };
  byId("add-message").onclick = addMessage;
  byId("run").onclick = () => run();
  byId("stop").onclick = () => compare.stop();
  byId("look").onclick = () => look(structuredClone(state), seen);
  byId("link").onclick = () => copyLink(state);
  byId("copy").onclick = () => {
    showCode();
    byId("code-dialog").showModal();
  };
  for (const radio of document.querySelectorAll("[name=code]")) radio.onchange = showCode;
  byId("copy-code").onclick = async () => {
    const select = () => getSelection().selectAllChildren(byId("code"));
    if (await copyText(byId("code").textContent, select)) flash(byId("copy-code"), "Copied");
  };
  byId("close-code").onclick = () => byId("code-dialog").close();
  byId("theme").onclick = turnTheme;
  byId("enter-key").onclick = start;
  const examples = byId("examples");
  examples.append(...EXAMPLES.map(({ name }, i) => h("option", { value: i }, name)));
  examples.onchange = () => {
    if (examples.value === "") return;
    show(example(EXAMPLES[examples.value], state));
    examples.value = "";
    if (ran && byId("again").checked) runSoon();
  };
  addEventListener("keydown", (event) => {
    if (document.querySelector("dialog[open]")) return;
    if ((event.ctrlKey || event.metaKey) && event.key === "Enter") {
      event.preventDefault();
      run();
    } else if (event.key === "Escape" && compare.isRunning) compare.stop();
  });
  addEventListener("hashchange", async () => {
    const shared = await unpack(location.hash);
    if (shared) show(sane(shared, state));
  });
}

/** Asks the server what it is, then shows what the link says, or the first example. */
async function start() {
  try {
    const [{ data }, known] = await Promise.all([ask("models"), ask("emphasis/head_sets")]);
    models = data;
    byId("model").replaceChildren(...models.map(({ id }) => h("option", { value: id }, id)));
    byId("model").disabled = models.length === 1; // then it is a text
    byId("enter-key").hidden = true;
    heads = new Heads(known, (chosen, alpha) => {
      state.heads = chosen;
      if (alpha && state.share === null) state.alpha = Math.min(1, Math.max(1e-4, alpha));
      drawKnobs();
      changed("knob");
    });
    past = new History(byId("runs"), {
      link: copyLink,
      restore: (run) => {
        show(sane(run.state, state));
        compare.show(run.results);
        byId("compare").scrollIntoView({ block: "nearest" });
      },
    });
    const knobs = {
      model: models[0].id, share: known.default?.share ?? null,
      alpha: known.default?.alpha ?? 0.01, heads: null, temperature: 0, samples: 1, seed: 1,
    };
    const base = example(EXAMPLES[0], knobs);
    show(sane(await unpack(location.hash), base));
    byId("run").disabled = false;
  } catch (e) {
    if (!(e instanceof Refused)) throw e;
    showRefused(e);
  }
}

byId("run").disabled = true;
listen();
start();
