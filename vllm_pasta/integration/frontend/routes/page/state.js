/** The state of the page, as it is shared and kept: what is asked, and how. */

export const EXAMPLES = [
  {
    name: "A fact that the model knows otherwise",
    mode: "raw",
    raw: {
      text: "Previously, Hermann Staudinger was a citizen of Germany. Currently, Hermann Staudinger was a citizen of Brazil. Hermann Staudinger was a citizen of",
      marked: "Hermann Staudinger was a citizen of Brazil",
    },
    maxTokens: 16,
  },
  {
    name: "A format that the model forgets",
    mode: "chat",
    messages: [
      {
        role: "user",
        text: "Elena Marchetti was born in Trieste, the youngest of four sisters. She studied in Padua and has worked for twenty years as a marine biologist, most of them on a research ship in the Adriatic Sea. She keeps bees.\n\nGive the name and the occupation of Elena Marchetti as a JSON object.",
        marked: "Give the name and the occupation of Elena Marchetti as a JSON object.",
      },
    ],
    maxTokens: 64,
  },
  {
    name: "Two marks, one weaker",
    mode: "raw",
    raw: {
      text: "Previously, Anna lived in Rome and worked as a baker. Currently, Anna lives in Oslo and works as a pilot. Anna works as a",
      marked: "works as a pilot",
      weaker: "Anna lives in Oslo",
    },
    maxTokens: 16,
  },
];

const LARGEST = 200_000;

/** A part with its marks, from an example's `marked` and `weaker`. */
function part({ role, text, marked, weaker }) {
  const marks = [[marked, 1], [weaker, 0.1]]
    .filter(([words]) => words)
    .map(([words, alpha]) => ({ start: text.indexOf(words), end: text.indexOf(words) + words.length, alpha }))
    .sort((a, b) => a.start - b.start);
  return { ...(role ? { role } : {}), text, marks };
}

/** The state that an example begins with; the knobs stay as they are. */
export function example({ mode, raw, messages, maxTokens }, knobs) {
  return {
    ...knobs,
    mode,
    raw: raw ? part(raw) : { text: "", marks: [] },
    messages: messages?.map(part) ?? [{ role: "user", text: "", marks: [] }],
    maxTokens,
  };
}

const number = (value, low, high, otherwise) =>
  Number.isFinite(value) ? Math.min(high, Math.max(low, value)) : otherwise;

function sanePart(value) {
  const text = typeof value?.text === "string" ? value.text.slice(0, LARGEST) : "";
  const marks = [];
  for (const mark of Array.isArray(value?.marks) ? value.marks : []) {
    const start = number(mark?.start, marks.at(-1)?.end ?? 0, text.length, 0) | 0;
    const end = number(mark?.end, 0, text.length, 0) | 0;
    if (start < end) marks.push({ start, end, alpha: number(mark.alpha, 1e-3, 1, 1) });
  }
  return { text, marks };
}

function saneHeads(value) {
  if (typeof value === "string" || value === null) return value;
  if (typeof value !== "object" || Array.isArray(value)) return null;
  const rows = Object.entries(value).filter(
    ([layer, heads]) => /^\d+$/.test(layer) && Array.isArray(heads) && heads.every(Number.isInteger),
  );
  return Object.fromEntries(rows);
}

/** What of a stranger's state makes sense; the rest as in `base`. */
export function sane(value, base) {
  if (!value || typeof value !== "object") return base;
  const messages = (Array.isArray(value.messages) ? value.messages : []).map((m) => ({
    role: ["system", "user", "assistant"].includes(m?.role) ? m.role : "user",
    ...sanePart(m),
  }));
  return {
    model: base.model,
    mode: value.mode === "raw" ? "raw" : "chat",
    raw: sanePart(value.raw),
    messages: messages.length ? messages : base.messages,
    alpha: number(value.alpha, 1e-4, 1, base.alpha),
    share: typeof value.share === "number" ? number(value.share, 0.05, 0.95, null) : null,
    heads: "heads" in value ? saneHeads(value.heads) : base.heads,
    temperature: number(value.temperature, 0, 2, base.temperature),
    maxTokens: number(value.maxTokens, 1, 4096, base.maxTokens) | 0,
    samples: number(value.samples, 1, 8, 1) | 0,
    seed: number(value.seed, 0, 2 ** 31, base.seed) | 0,
  };
}

/** A few words for a run in the history. */
export function title(state) {
  const texts = state.mode === "raw" ? [state.raw] : state.messages;
  const marked = texts.flatMap(({ text, marks }) => marks.map((m) => text.slice(m.start, m.end)));
  const words = marked.length ? marked.join(" … ") : texts.at(-1).text;
  return words.replace(/\s+/g, " ").slice(0, 80) || "An empty prompt";
}
