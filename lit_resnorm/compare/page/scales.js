// Axes: where a value stands, and the values that are marked.

const LARGEST = Number.MAX_VALUE;
const SMALLEST = Number.MIN_VALUE;

/** Return the limits of finite values, or null where there are none. */
function limits(values, isFit = Number.isFinite) {
  let low = Infinity;
  let high = -Infinity;
  for (const value of values) {
    if (Number.isFinite(value) && isFit(value)) {
      if (value < low) low = value;
      if (value > high) high = value;
    }
  }
  return low <= high ? [low, high] : null;
}

/** Return a scale from values to pixels with even steps. */
function linearScale([low, high], [from, to], count) {
  // in units of a power of ten, so that no difference overflows
  const size = Math.max(Math.abs(low), Math.abs(high), 1e-300);
  const unit = 10 ** Math.floor(Math.log10(size));
  const [start, end] = [low / unit, high / unit];
  const step = niceStep((end - start) / Math.max(1, count));
  const ticks = [];
  const first = Math.ceil(start / step - 1e-9);
  for (let k = 0; k <= 2 * count + 2; k += 1) {
    const place = (first + k) * step;
    const at = place * unit;
    if (place <= end + step * 1e-9) ticks.push({ at, text: tickText(at, step * unit) });
  }
  const slope = (to - from) / (end - start);
  const at = (value) => from + (value / unit - start) * slope;
  return { at, ticks, holds: () => true };
}

function niceStep(rough) {
  const power = 10 ** Math.floor(Math.log10(rough));
  const factor = [1, 2, 5, 10].find((nice) => nice * power >= rough * 0.999);
  return factor * power;
}

/** Return a scale for positive values with even ratios. */
function logScale([low, high], [from, to], count) {
  const [first, last] = [Math.log10(low), Math.log10(high)];
  const slope = (to - from) / (last - first);
  const stride = Math.max(1, Math.ceil((last - first) / count));
  let ticks = [];
  for (let power = Math.ceil(first); power <= last; power += stride) {
    ticks.push(10 ** power);
  }
  if (last - first < 2.5) {
    const digits = last - first < 1.2 ? [1, 2, 3, 5, 7] : [1, 2, 5];
    ticks = [];
    for (let power = Math.floor(first); power <= last; power += 1) {
      for (const digit of digits) ticks.push(digit * 10 ** power);
    }
    ticks = ticks.filter((value) => value >= low * 0.999 && value <= high * 1.001);
  }
  if (ticks.length < 2) ticks = linearScale([low, high], [0, 1], 4).ticks.map((t) => t.at);
  return {
    at: (value) => from + (Math.log10(value) - first) * slope,
    ticks: ticks.map((at) => ({ at, text: tickText(Number(at.toPrecision(12))) })),
    holds: (value) => value > 0,
  };
}

/** Return a logarithmic scale of counts that has a place for 0. */
function countScale([low, high], [from, to]) {
  const place = (value) => Math.log10(1 + Math.max(0, value));
  const slope = (to - from) / (place(high) - place(low) || 1);
  const ticks = [0];
  for (let value = 1; value <= high; value *= 10) ticks.push(value);
  return {
    at: (value) => from + (place(value) - place(low)) * slope,
    ticks: ticks.filter((at) => at >= low).map((at) => ({ at, text: tickText(at) })),
    holds: () => true,
  };
}

/** Return limits a little wider, and never of no width. */
function widened([low, high], isLog) {
  if (isLog) {
    const ratio = low === high ? 2 : (high / low) ** 0.04;
    return [inRange(low / ratio), inRange(high * ratio)];
  }
  const margin = low === high ? Math.abs(low) * 0.1 || 1 : high * 0.04 - low * 0.04;
  return [Math.max(low - margin, -LARGEST), Math.min(high + margin, LARGEST)];
}

function inRange(positive) {
  return Math.min(LARGEST, Math.max(SMALLEST, positive));
}

/** Say whether values are drawn on a logarithmic axis, as declared where they allow it. */
function fitsLog(values, scale) {
  if (scale !== "log") return scale !== "linear" && wantsLog(values);
  return values.some((value) => value > 0) && !values.some((value) => value < 0);
}

/** Say whether values are better seen on a logarithmic axis: nearly all above 0, and wide. */
function wantsLog(values) {
  const positive = (value) => value > 0;
  const range = limits(values, positive);
  const finite = values.filter(Number.isFinite);
  const share = finite.filter(positive).length / finite.length;
  return range !== null && share >= 0.75 && range[1] / range[0] > 300;
}
