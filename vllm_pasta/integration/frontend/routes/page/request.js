/** From the page's state to the bodies of requests, and to code that sends the same. */

import { characters, occurrences } from "./marks.js";

const LONGEST_TEXT = 200;

/** The texts of a state that can be marked, each with the message it is. */
export function parts(state) {
  if (state.mode === "raw") return [{ ...state.raw, message: null }];
  return state.messages.map((part, message) => ({ ...part, message }));
}

/**
 * What the request says of its marks, or null where there is none.
 *
 * A mark is given by its text where that stands there once, else by characters. `fields` says which
 * mark each field of the request is, as the server's errors name them.
 */
export function emphasis(state) {
  const lists = { text: [], chars: [] };
  const fields = new Map();
  parts(state).forEach(({ text, marks, message }, part) => {
    marks.forEach(({ start, end, alpha }, mark) => {
      const marked = text.slice(start, end);
      const simple = marked.length <= LONGEST_TEXT && occurrences(text, marked) === 1;
      const range = [characters(text, start), characters(text, end)];
      const item = {
        ...(message === null ? {} : { message }),
        ...(simple ? { text: marked } : { chars: range }),
        ...(alpha === 1 ? {} : { alpha }),
      };
      const name = simple ? "text" : "chars";
      const key = `emphasis.${name}[${lists[name].length}]`;
      fields.set(key, { part, mark });
      lists[name].push(simple && Object.keys(item).length === 1 ? marked : item);
    });
  });
  if (!fields.size) return null;
  const value = state.share === null ? { alpha: state.alpha } : { share: state.share };
  for (const name of ["text", "chars"]) if (lists[name].length) value[name] = lists[name];
  if (state.heads !== null) value.heads = state.heads;
  return { value, fields };
}

/** The path of the request, below /v1/. */
export const path = (state) => (state.mode === "raw" ? "completions" : "chat/completions");

/** The request's body; with `emphasised`, what the marks say too. */
export function body(state, emphasised) {
  const value = { model: state.model };
  if (state.mode === "raw") value.prompt = state.raw.text;
  else value.messages = state.messages.map(({ role, text }) => ({ role, content: text }));
  value.max_tokens = state.maxTokens;
  value.temperature = state.temperature;
  if (state.samples > 1) value.n = state.samples;
  if (state.temperature > 0) value.seed = state.seed;
  const marked = emphasised ? emphasis(state) : null;
  if (marked) value.emphasis = marked.value;
  return value;
}

/** What a resolve of the same prompt needs. */
export function prompt(state) {
  const { model, prompt, messages, emphasis } = body(state, true);
  return { model, prompt, messages, emphasis };
}

/** Code that sends what the page sends: for a shell, the `openai` package, and vLLM in Python. */
export function code(state, { url, hasKey, model, defaultHeads }) {
  const sent = body(state, true);
  return {
    curl: curl(state, sent, url, hasKey),
    openai: openai(state, sent, url, hasKey),
    python: offline(state, sent, model, defaultHeads),
  };
}

function curl(state, sent, url, hasKey) {
  const key = hasKey ? ` \\\n  -H "Authorization: Bearer $VLLM_API_KEY"` : "";
  const data = JSON.stringify(sent, null, 1).replaceAll("'", "'\\''");
  return `curl -s ${url}${path(state)} \\
  -H 'Content-Type: application/json'${key} \\
  -d '${data}'`;
}

function openai(state, sent, url, hasKey) {
  const { emphasis: marked, ...own } = sent;
  const extra = marked ? { extra_body: { emphasis: marked } } : {};
  const key = hasKey ? `os.environ["VLLM_API_KEY"]` : `"none"`;
  const called = state.mode === "raw" ? "completions" : "chat.completions";
  const answer = state.mode === "raw" ? "choice.text" : "choice.message.content";
  return `${hasKey ? "import os\n\n" : ""}from openai import OpenAI

client = OpenAI(base_url="${url.replace(/\/$/, "")}", api_key=${key})
answer = client.${called}.create(
${keywords({ ...own, ...extra })}
)
for choice in answer.choices:
    print(${answer})
`;
}

function offline(state, sent, model, defaultHeads) {
  const { model: _, prompt, messages, emphasis: marked, ...sampling } = sent;
  const whole = marked && { ...marked, heads: marked.heads ?? defaultHeads ?? undefined };
  const extra = whole ? { extra: { emphasis: whole } } : {};
  const call = state.mode === "raw" ? "generate" : "chat";
  return `from vllm import LLM
from vllm_pasta import SamplingParams

if __name__ == "__main__":
    llm = LLM(${python(model)}, additional_config={"pasta": {}})
    params = SamplingParams(
${keywords({ ...sampling, ...extra }, "        ")}
    )
    (answer,) = llm.${call}(
        ${python(prompt ?? messages, "        ")},
        params,
    )
    for output in answer.outputs:
        print(output.text)
`;
}

const keywords = (object, indent = "    ") =>
  Object.entries(object)
    .map(([name, value]) => `${indent}${name}=${python(value, indent)},`)
    .join("\n");

/** A JSON value as Python writes it; what is long goes over several lines. */
function python(value, indent = "") {
  if (value === null) return "None";
  if (value === true) return "True";
  if (value === false) return "False";
  if (typeof value !== "object") return JSON.stringify(value);
  const [open, close] = Array.isArray(value) ? "[]" : "{}";
  const inner = `${indent}    `;
  const items = (deeper) =>
    Array.isArray(value)
      ? value.map((item) => python(item, deeper))
      : Object.entries(value)
          .filter(([, item]) => item !== undefined)
          .map(([name, item]) => `${JSON.stringify(name)}: ${python(item, deeper)}`);
  const flat = open + items(indent).join(", ") + close;
  if (flat.length + indent.length <= 80 && !flat.includes("\n")) return flat;
  return `${open}\n${items(inner).map((item) => `${inner}${item},\n`).join("")}${indent}${close}`;
}
