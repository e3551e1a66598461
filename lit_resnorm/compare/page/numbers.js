// Numbers and other values as text.

const NOTHING = "\u2013";
const MINUS = "\u2212";

/** Return a number with so many significant digits. */
function shown(value, digits = 4) {
  if (value === null || value === undefined) return NOTHING;
  if (Number.isNaN(value)) return "NaN";
  if (!Number.isFinite(value)) return value > 0 ? "\u221e" : `${MINUS}\u221e`;
  const size = Math.abs(value);
  let text;
  if (value === 0) text = "0";
  else if (size >= 1e6 || size < 1e-4) text = exponential(value, digits);
  else if (Number.isInteger(value)) text = String(value);
  else if (size >= 10 ** (digits - 1)) text = value.toFixed(0);
  else text = value.toPrecision(digits);
  return text.replace("-", MINUS).replace("e-", `e${MINUS}`);
}

function exponential(value, digits) {
  const [front, power] = value.toExponential(digits - 1).split("e");
  return `${trimmed(front)}e${Number(power)}`;
}

/** Return a short text for a mark on an axis. */
function tickText(value, step) {
  const size = Math.abs(value);
  if (value === 0) return "0";
  if (size >= 1e5 || size < 1e-3) return shown(value, 3);
  const places = step ? Math.max(0, -Math.floor(Math.log10(step) + 1e-9)) : 0;
  const text = step ? value.toFixed(places) : String(Number(value.toPrecision(3)));
  return text.replace("-", MINUS);
}

/** Return a number without zeros that end its decimals. */
function trimmed(text) {
  return text.includes(".") ? text.replace(/\.?0+(?=e|$)/, "") : text;
}

/** Return what stands in a cell of the results for a run. */
function cellText(value, digits) {
  if (value === null || value === undefined) return NOTHING;
  if (isBroken(value) || typeof value === "number") {
    return trimmed(shown(numeric(value), digits));
  }
  return String(value);
}

/** Return mean, spread and count of a group. */
function spreadText(cell, digits) {
  if (cell === null || cell === undefined) return NOTHING;
  if (typeof cell !== "object") return cellText(cell, digits);
  const mean = cellText(cell.mean, digits);
  if (!(cell.count > 1)) return mean;
  const spread = cell.std == null ? "" : ` \u00b1 ${cellText(cell.std, 2)}`;
  return `${mean}${spread} (${cell.count})`;
}

/** Return a value of a config as text. */
function settingText(value) {
  if (value === null || value === undefined) return NOTHING;
  if (Array.isArray(value)) return `[${value.map(settingText).join(", ")}]`;
  return typeof value === "object" ? JSON.stringify(value) : String(value);
}

/** Return a duration in seconds as text. */
function durationText(seconds) {
  if (seconds < 90) return `${shown(seconds, 3)} s`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min`;
  return `${(seconds / 3600).toFixed(1)} h`;
}

/** Return "1 run", "2 runs". */
function counted(count, word) {
  return `${count} ${word}${count === 1 ? "" : "s"}`;
}
