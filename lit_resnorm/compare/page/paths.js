// Curves as SVG paths.

/** Return indices of the points to draw: first, last, least and largest a pixel. */
function visible(xs, ys) {
  const kept = [];
  let start = 0;
  while (start < xs.length) {
    const column = Math.round(xs[start]);
    let end = start;
    let low = start;
    let high = start;
    while (end < xs.length && Math.round(xs[end]) === column) {
      if (ys[end] < ys[low]) low = end;
      if (ys[end] > ys[high]) high = end;
      end += 1;
    }
    const picked = [start, Math.min(low, high), Math.max(low, high), end - 1];
    for (const index of picked) if (index !== kept[kept.length - 1]) kept.push(index);
    start = end;
  }
  return kept;
}

/** Return the path through points in pixels; what isn't finite leaves a gap. */
function linePath(xs, ys) {
  const crowded = xs.length > 2 * (xs[xs.length - 1] - xs[0]);
  const whole = crowded && ys.every(Number.isFinite);
  const picked = whole ? visible(xs, ys) : xs.keys();
  let path = "";
  let pen = "M";
  for (const index of picked) {
    if (Number.isFinite(xs[index]) && Number.isFinite(ys[index])) {
      path += `${pen}${xs[index].toFixed(1)} ${ys[index].toFixed(1)}`;
      // a point between two gaps is a line of no length, drawn as a dot
      if (pen === "M") path += "h0";
      pen = "L";
    } else pen = "M";
  }
  return path;
}

/** Return the path around the band between two curves in pixels. */
function bandPath(xs, lows, highs) {
  let path = "";
  let start = 0;
  const fit = (index) => Number.isFinite(lows[index]) && Number.isFinite(highs[index]);
  while (start < xs.length) {
    while (start < xs.length && !fit(start)) start += 1;
    let end = start;
    while (end < xs.length && fit(end)) end += 1;
    if (end > start) {
      const there = [];
      const back = [];
      for (let i = start; i < end; i += 1) {
        there.push(`${xs[i].toFixed(1)} ${highs[i].toFixed(1)}`);
        back.unshift(`${xs[i].toFixed(1)} ${lows[i].toFixed(1)}`);
      }
      path += `M${there.join("L")}L${back.join("L")}z`;
    }
    start = end;
  }
  return path;
}

/** Return indices of the points that get a mark: all of a few, else some. */
function markedPoints(count, place) {
  if (count <= 16) return [...Array(count).keys()];
  const stride = count / 6;
  const shift = ((place * 0.37) % 1) * stride;
  return Array.from({ length: 6 }, (_, k) => Math.floor(shift + k * stride)).filter(
    (index) => index < count,
  );
}

/** Return the index of the value in an ascending list that is nearest to another. */
function nearest(sorted, value) {
  let low = 0;
  let high = sorted.length - 1;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (sorted[middle] < value) low = middle + 1;
    else high = middle;
  }
  if (low > 0 && value - sorted[low - 1] <= sorted[low] - value) return low - 1;
  return low;
}
