/** Which words of two texts are in one of them only. */

const MOST_WORDS = 1500; // the table below has the square of it

/** Words with the white space before them, so that they make up the text again. */
const words = (text) => text.match(/\s*\S+|\s+$/g) ?? [];

/**
 * The longest common subsequence, by words.
 *
 * Returns for each text its words as `[word, isOnlyHere]`.
 */
export function diff(a, b) {
  const [left, right] = [words(a), words(b)];
  const [x, y] = [left, right].map((list) => list.slice(0, MOST_WORDS).map((w) => w.trim()));
  const width = y.length + 1;
  const length = new Uint16Array((x.length + 1) * width);
  for (let i = x.length - 1; i >= 0; i -= 1) {
    for (let j = y.length - 1; j >= 0; j -= 1) {
      length[i * width + j] =
        x[i] === y[j]
          ? length[(i + 1) * width + j + 1] + 1
          : Math.max(length[(i + 1) * width + j], length[i * width + j + 1]);
    }
  }
  const own = [new Set(), new Set()];
  let [i, j] = [0, 0];
  while (i < x.length || j < y.length) {
    if (i < x.length && j < y.length && x[i] === y[j]) [i, j] = [i + 1, j + 1];
    else if (j >= y.length || (i < x.length && length[(i + 1) * width + j] >= length[i * width + j + 1]))
      own[0].add(i++);
    else own[1].add(j++);
  }
  return [left, right].map((list, side) => list.map((word, k) => [word, own[side].has(k)]));
}
