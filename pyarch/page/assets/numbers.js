// How numbers and long names are shown.

/** A number with so many significant digits, in powers of ten where it is very large or very small. */
function shown(value, digits = 4) {
  if (value === null || value === undefined) return "-";
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-4 || size >= 1e7)) return value.toExponential(Math.min(2, digits - 1)).replace(/\.?0+e/, "e").replace("e+", "e");
  return value.toLocaleString("en", { maximumSignificantDigits: size >= 1000 ? Math.max(digits, Math.ceil(Math.log10(size + 1))) : digits });
}

function withUnit(value, axis) {
  return axis.unit && value !== null ? `${shown(value)} ${axis.unit}` : shown(value);
}

const RULER = document.createElement("canvas").getContext("2d");

/** A name of at most so many pixels, without its middle: names of layers differ at both ends. */
function shortened(name, most, font) {
  RULER.font = font;
  const long = RULER.measureText(name).width;
  if (long <= most) return name;
  const letters = Array.from(name);
  const cut = (kept) => `${letters.slice(0, Math.ceil(kept / 2)).join("")}\u2026${letters.slice(-Math.floor(kept / 2)).join("")}`;
  let kept = Math.floor((letters.length * most) / long);
  while (kept > 4 && RULER.measureText(cut(kept)).width > most) kept -= 1;
  return cut(Math.max(4, kept));
}

/** An element that holds text and other elements; text never becomes markup. */
function element(name, kind, ...children) {
  const made = document.createElement(name);
  if (kind) made.className = kind;
  made.append(...children);
  return made;
}
