// The values of a chart as a table.

/** Return the table of a model's values, and a sentence where rows are left out. */
function valueTable(model, stops) {
  const stride = Math.ceil(stops.length / MOST_ROWS) || 1;
  const last = stops.length - 1;
  const kept = stops.filter((_, i) => i % stride === 0 || i === last);
  const points = model.curves.map(
    (curve) => new Map(Array.from(curve.xs, (x, index) => [x, index])),
  );
  const labelled = model.curves.some((curve) => curve.labels);
  const rows = kept.map((x) => {
    const row = html("tr", {}, rowHead(model.at(x), "sticky"));
    model.curves.forEach((curve, index) => {
      const point = points[index].get(x) ?? -1;
      const text = valueText(curve, point);
      const label = labelled && point >= 0 ? curve.labels?.[point] : null;
      const under = label ? html("span", { class: "soft site" }, label) : null;
      row.append(html("td", {}, text, under));
    });
    return row;
  });
  const names = model.curves.map((curve) => columnHead(curve.name));
  const table = html(
    "table",
    {},
    html("caption", { class: "hidden" }, model.name),
    html("thead", {}, html("tr", {}, columnHead(model.across), ...names)),
    html("tbody", {}, ...rows),
  );
  const box = scrolled(`Values of ${model.name}`, table);
  if (stride === 1) return [box];
  const text = `${kept.length} of ${stops.length} rows: each ${stride}th, and the last.`;
  return [html("p", { class: "soft" }, text), box];
}
