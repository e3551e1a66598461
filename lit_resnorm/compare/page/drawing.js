// A plot: axes and curves of a model drawn into an SVG element.
//
// A model is {xTitle, xKind: "linear" | "count" | "log", yKind: "linear" | "log",
// curves: [{name, look, xs, ys, lows?, highs?, labels?, broken}]}: `labels` name
// the points, `broken` holds indices of values that aren't finite.

const MARGIN = { left: 58, right: 16, top: 12, bottom: 38 };

/** Draw a model; return its scales and the elements of its curves. */
function drawPlot(plot, model, width, height) {
  const inner = {
    left: MARGIN.left,
    right: width - MARGIN.right,
    top: MARGIN.top,
    bottom: height - MARGIN.bottom,
  };
  plot.setAttribute("viewBox", `0 0 ${width} ${height}`);
  const axes = scalesOf(model, inner);
  if (!axes) {
    const middle = { x: width / 2, y: height / 2, class: "nothing" };
    plot.replaceChildren(svg("text", middle, model.nothing || "nothing to draw"));
    return { inner, axes: null, lines: [] };
  }
  const lines = model.curves.map((curve) => drawCurve(curve, axes, inner));
  const bands = lines.map((line) => line.band).filter(Boolean);
  plot.replaceChildren(
    drawAxes(model, axes, inner),
    svg("g", { class: "bands" }, ...bands),
    svg("g", { class: "lines" }, ...lines.map((line) => line.group)),
    svg("g", { class: "cursor" }),
  );
  return { inner, axes, lines };
}

function scalesOf(model, inner) {
  const yLog = model.yKind === "log";
  const fits = (value) => !yLog || value > 0;
  const values = [];
  const places = [];
  for (const { xs, ys, lows, highs } of model.curves) {
    for (const part of [ys, lows, highs]) {
      const found = part && limits(part, fits);
      if (found) values.push(...found);
    }
    const found = limits(xs, (x) => model.xKind !== "log" || x > 0);
    if (found) places.push(...found);
  }
  const yRange = limits(values);
  const xRange = limits(places);
  if (!yRange || !xRange) return null;
  // a curve that begins early begins at its distance from the start
  if (model.fromZero && xRange[0] > 0 && xRange[0] < xRange[1] / 2) xRange[0] = 0;
  const yScale = yLog ? logScale : linearScale;
  const numMarks = Math.max(2, Math.floor((inner.right - inner.left) / 80));
  const across = [inner.left, inner.right];
  const y = yScale(widened(yRange, yLog), [inner.bottom, inner.top], 5);
  return { x: xScale(model.xKind, xRange, across, numMarks), y };
}

function xScale(kind, range, across, numMarks) {
  const wide = range[0] < range[1] ? range : widened(range, kind === "log");
  if (kind === "count") return countScale(wide, across);
  return (kind === "log" ? logScale : linearScale)(wide, across, numMarks);
}

function drawAxes(model, axes, inner) {
  const group = svg("g", { class: "axes", "aria-hidden": "true" });
  for (const { at, text } of axes.y.ticks) {
    const y = axes.y.at(at).toFixed(1);
    group.append(
      svg("path", { class: "grid", d: `M${inner.left} ${y}H${inner.right}` }),
      svg("text", { class: "y-text", x: inner.left - 7, y: Number(y) + 4 }, text),
    );
  }
  for (const { at, text } of axes.x.ticks) {
    const x = axes.x.at(at).toFixed(1);
    group.append(
      svg("path", { class: "tick", d: `M${x} ${inner.bottom}v5` }),
      svg("text", { class: "x-text", x, y: inner.bottom + 17 }, text),
    );
  }
  const title = { class: "x-title", x: inner.right, y: inner.bottom + 33 };
  group.append(
    svg("path", { class: "axis", d: `M${inner.left} ${inner.bottom}H${inner.right}` }),
    svg("text", title, model.xTitle),
  );
  return group;
}

function drawCurve(curve, axes, inner) {
  const { look } = curve;
  const onX = (value) => (axes.x.holds(value) ? axes.x.at(value) : NaN);
  const onY = (value) => (axes.y.holds(value) ? axes.y.at(value) : NaN);
  const xs = curve.xs.map(onX);
  const ys = curve.ys.map(onY);
  const group = svg("g", { class: look.colour });
  const path = { class: "curve", d: linePath(xs, ys), "stroke-dasharray": look.dashes };
  group.append(svg("path", path));
  for (const index of markedPoints(xs.length, look.place)) {
    if (!Number.isFinite(ys[index]) || !Number.isFinite(xs[index])) continue;
    const at = `translate(${xs[index].toFixed(1)} ${ys[index].toFixed(1)})`;
    group.append(svg("path", { class: "mark", d: look.mark, transform: at }));
  }
  if (curve.broken.length) {
    const x = xs[curve.broken[0]].toFixed(1);
    const cross = `M${x - 5} ${inner.top}l10 10m0 -10l-10 10`;
    group.append(svg("path", { class: "cross", d: cross }));
  }
  return { group, xs, ys, band: drawBand(curve, look, xs, axes, inner) };
}

function drawBand(curve, look, xs, axes, inner) {
  if (!curve.lows) return null;
  // on a logarithmic axis a band that reaches below 0 goes down to the edge
  const edge = (value) => {
    if (!Number.isFinite(value)) return NaN;
    return axes.y.holds(value) ? Math.min(axes.y.at(value), inner.bottom) : inner.bottom;
  };
  const path = bandPath(xs, curve.lows.map(edge), curve.highs.map(edge));
  return svg("path", { class: `band ${look.colour}`, d: path });
}
