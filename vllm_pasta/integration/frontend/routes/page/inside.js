/** Where the attention of the prompt's last token goes, plain and emphasised. */

import { ask } from "./api.js";
import { announce, byId, h } from "./dom.js";
import { prompt } from "./request.js";

const percent = (share) => `${(100 * share).toFixed(share < 0.0995 ? 1 : 0)} %`;

/** Asks for the attention of a state, and shows it; of a head, or of the one that changes most. */
export async function look(state, tokens, at = null) {
  const button = byId("look");
  const error = byId("inside-error");
  button.disabled = true;
  error.hidden = true;
  try {
    const query = at ? `?layer=${at[0]}&head=${at[1]}` : "";
    const seen = await ask(`emphasis/attention${query}`, prompt(state));
    show(seen, tokens, (layer, head) => look(state, tokens, [layer, head]));
    announce(byId("inside-said").textContent);
  } catch (e) {
    error.textContent = e.message;
    error.hidden = false;
  } finally {
    button.disabled = false;
  }
}

/** Forgets what was seen: it is of another prompt. */
export function forget() {
  byId("inside").hidden = true;
}

function show({ heads, layer, head, map }, tokens, choose) {
  byId("inside").hidden = false;
  const mean = (kind) => heads.reduce((sum, of) => sum + of[kind], 0) / heads.length;
  byId("inside-said").textContent =
    `On average, the ${heads.length} steered heads give the marks ${percent(mean("plain"))} of their ` +
    `attention, and ${percent(mean("emphasised"))} when emphasised.`;
  const sorted = [...heads].sort((a, b) => b.emphasised - b.plain - (a.emphasised - a.plain));
  byId("inside-heads").replaceChildren(...sorted.map((of) => {
    const isShown = of.layer === layer && of.head === head;
    const bar = (kind) => {
      const element = h("span", { className: `bar-of ${kind}` });
      element.style.setProperty("--share", of[kind]);
      return element;
    };
    return h("li", {},
      h("button", {
        type: "button", "aria-pressed": String(isShown),
        "aria-label": `layer ${of.layer}, head ${of.head}: ${percent(of.plain)} on the marks, ` +
          `${percent(of.emphasised)} when emphasised`,
        onclick: () => choose(of.layer, of.head),
      },
      h("span", { className: "name" }, `${of.layer}.${of.head}`),
      h("span", { className: "bars" }, bar("plain"), bar("emphasised")),
      h("span", { className: "name" }, percent(of.emphasised))));
  }));
  byId("map-title").textContent = `Layer ${layer}, head ${head}: what the last token attends to`;
  for (const kind of ["plain", "emphasised"]) {
    const most = Math.max(...map[kind], 1e-9);
    byId(`map-${kind}`).replaceChildren(...tokens.map((token, i) => {
      const span = h("span", { className: "heat", title: percent(map[kind][i]) },
        token.replaceAll("\n", "⏎\n"));
      span.style.setProperty("--heat", Math.sqrt(map[kind][i] / most));
      return span;
    }));
  }
}
