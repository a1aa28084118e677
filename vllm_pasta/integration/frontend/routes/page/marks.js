/**
 * Marks of one text: `{start, end, alpha}`, half open, in JavaScript's string positions (UTF-16),
 * sorted and disjoint. `alpha` is the factor of the marked tokens; 1 is full strength.
 */

const WORD = /[\p{L}\p{N}\p{M}_'’-]/u;

/** The selection without white space at its ends; a caret selects its word. */
export function wanted(text, start, end) {
  if (start === end) {
    while (start > 0 && WORD.test(text[start - 1])) start -= 1;
    while (end < text.length && WORD.test(text[end])) end += 1;
  }
  while (start < end && /\s/.test(text[start])) start += 1;
  while (end > start && /\s/.test(text[end - 1])) end -= 1;
  return [start, end];
}

/** Marks the range; or takes the mark away where all of it is marked already. */
export function toggled(marks, start, end) {
  if (start >= end) return marks;
  const inside = marks.filter((m) => m.start < end && m.end > start);
  const covered = inside.reduce((n, m) => n + Math.min(m.end, end) - Math.max(m.start, start), 0);
  const left = marks.flatMap((m) => {
    if (!inside.includes(m)) return [m];
    return [
      { ...m, end: Math.min(m.end, start) },
      { ...m, start: Math.max(m.start, end) },
    ].filter((part) => part.start < part.end);
  });
  if (covered < end - start) left.push({ start, end, alpha: inside[0]?.alpha ?? 1 });
  return left.sort((a, b) => a.start - b.start);
}

/** The marks after characters `[from, oldEnd)` were replaced by `[from, newEnd)`. */
export function edited(marks, from, oldEnd, newEnd) {
  const by = newEnd - oldEnd;
  return marks
    .map((m) => ({
      ...m,
      start: m.start >= oldEnd ? m.start + by : m.start <= from ? m.start : newEnd,
      end: m.end > oldEnd || (m.end === oldEnd && oldEnd > from) ? m.end + by : Math.min(m.end, from),
    }))
    .filter((m) => m.start < m.end);
}

/** Where two texts differ, as `edited` wants it; `caret` is where the new text was typed. */
export function change(before, after, caret) {
  const most = Math.min(before.length, after.length);
  const longest = Math.min(most, after.length - caret);
  let end = 0;
  while (end < longest && before.at(-1 - end) === after.at(-1 - end)) end += 1;
  let from = 0;
  while (from < most - end && before[from] === after[from]) from += 1;
  return [from, before.length - end, after.length - end];
}

/** A position of JavaScript's as a number of characters (code points), as the server counts. */
export const characters = (text, position) => [...text.slice(0, position)].length;

/**
 * How many times a text holds another, overlapping ones too; counts to two.
 *
 * Canonically equivalent texts are the same text, as they are to the server.
 */
export function occurrences(text, part) {
  [text, part] = [text.normalize(), part.normalize()];
  const first = text.indexOf(part);
  if (first < 0) return 0;
  return text.indexOf(part, first + 1) < 0 ? 1 : 2;
}
