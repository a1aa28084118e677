/** Small helpers to make and find elements. */

export const byId = (id) => document.getElementById(id);

/** Makes an element: properties starting with `on` are listeners, others attributes or properties. */
export function h(tag, props = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name in element && !name.startsWith("aria")) element[name] = value;
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

/** Calls `f` once nothing has asked for it for `ms` milliseconds. */
export function debounced(f, ms) {
  let timer = 0;
  return () => {
    clearTimeout(timer);
    timer = setTimeout(f, ms);
  };
}

/** Tells people who use a screen reader. */
export function announce(text) {
  byId("live").textContent = text;
}

/** Copies a text; where the browser forbids that, selects it for the user to copy. */
export async function copyText(text, fallback) {
  try {
    await navigator.clipboard.writeText(text);
    announce("Copied");
    return true;
  } catch {
    fallback?.();
    return false;
  }
}
