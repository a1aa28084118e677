/** The server that this page came from, and no other. Its API key is kept in this variable alone. */

import { byId } from "./dom.js";

const BASE = new URL("v1/", document.baseURI);
let key = null;
let asking = null;

export const hasKey = () => key !== null;

/** What the server refused, in its own words. `status` is 0 where there was no answer at all. */
export class Refused extends Error {
  constructor(status, message, body = null) {
    super(message);
    this.status = status;
    this.body = body;
  }
}

/** Asks for the API key; every request that waits for it shares one dialog. */
function askForKey() {
  asking ??= new Promise((resolve, reject) => {
    const dialog = byId("key-dialog");
    const input = byId("key");
    byId("key-wrong").hidden = key === null;
    input.value = "";
    dialog.onclose = () => {
      const value = input.value.trim();
      input.value = "";
      asking = null;
      byId("enter-key").hidden = true;
      if (dialog.returnValue === "use" && value) {
        key = value;
        resolve();
      } else {
        byId("enter-key").hidden = false;
        reject(new Refused(401, "The server wants an API key: use “Enter the API key” above."));
      }
    };
    dialog.returnValue = "";
    dialog.showModal();
    input.focus();
  });
  return asking;
}

async function send(path, body, signal) {
  for (;;) {
    const used = key;
    const headers = {};
    if (body !== undefined) headers["Content-Type"] = "application/json";
    if (used !== null) headers.Authorization = `Bearer ${used}`;
    let response;
    try {
      response = await fetch(new URL(path, BASE), {
        method: body === undefined ? "GET" : "POST",
        headers,
        body: body === undefined ? undefined : JSON.stringify(body),
        signal,
        cache: "no-store",
      });
    } catch (e) {
      if (e.name === "AbortError") throw e;
      throw new Refused(0, "The server does not answer. Is it still running?");
    }
    if (response.ok) return response;
    if (response.status === 401) {
      if (used === key) await askForKey();
      continue;
    }
    throw await refusal(response);
  }
}

async function refusal(response) {
  const text = await response.text();
  let said = text;
  try {
    const { error, detail } = JSON.parse(text);
    said = error?.message ?? error ?? detail ?? text;
  } catch {
    // not JSON: shown as it is
  }
  if (typeof said !== "string") said = JSON.stringify(said);
  return new Refused(response.status, said || `HTTP ${response.status}`);
}

/** A JSON answer; POST where there is a body. */
export async function ask(path, body, signal) {
  return (await send(path, body, signal)).json();
}

/** The chunks of a streamed answer (server-sent events). */
export async function* stream(path, body, signal) {
  const wanted = { ...body, stream: true, stream_options: { include_usage: true } };
  const response = await send(path, wanted, signal);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    text += value;
    const events = text.split(/\r?\n\r?\n/);
    text = events.pop();
    for (const event of events) {
      const data = event.replace(/^data: ?/, "");
      if (data === "[DONE]") return;
      if (!event.startsWith("data:")) continue;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Refused(chunk.error.code ?? 500, chunk.error.message);
      yield chunk;
    }
  }
}
