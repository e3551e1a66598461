// What the charts draw: curves of the chosen runs or groups.

/** Return the runs or groups that are drawn, each with the place of its look. */
function drawnItems(choice) {
  return choice.drawn
    .map((index, place) => ({ item: choice.items[index], place }))
    .filter(({ item }) => item);
}

function brokenOf(values) {
  const places = [];
  values.forEach((value, index) => isBroken(value) && places.push(index));
  return places;
}

function missingOf(values) {
  const missing = new Set();
  values.forEach((value, index) => value === null && missing.add(index));
  return missing;
}

/** Return a curve through stored values. */
function curveOf(name, look, xs, values, extra) {
  const broken = brokenOf(values);
  return {
    name,
    look,
    xs,
    ys: values.map(numeric),
    broken,
    missing: missingOf(values),
    ...extra,
  };
}

/** Return the curves of a quantity over training. */
function trainingCurves(comparison, choice, key) {
  const stored = choice.drawsGroups ? comparison.groupSeries : comparison.series;
  const kind = choice.drawsGroups ? "group" : "run";
  const series = new Map((stored[key] || []).map((one) => [one[kind], one]));
  return drawnItems(choice).flatMap(({ item, place }) => {
    const one = series.get(item.index);
    if (!one) return [];
    const name = item.label ?? item.name;
    const values = one.mean || one.value;
    const curve = curveOf(name, lookAt(place), one.step, values, {});
    const first = curve.broken[0];
    if (first !== undefined) curve.note = `not finite from step ${one.step[first]} on`;
    if (one.thinned) curve.thinned = true;
    if (one.mean) addSpread(curve, (one.std || []).map(numeric), one.count || []);
    return [curve];
  });
}

function addSpread(curve, spreads, counts) {
  curve.spreads = spreads;
  curve.counts = counts;
  if (!counts.some((count) => count > 1)) return;
  curve.lows = curve.ys.map((y, i) => y - (counts[i] > 1 ? spreads[i] : 0));
  curve.highs = curve.ys.map((y, i) => y + (counts[i] > 1 ? spreads[i] : 0));
}

/** Return the records by depth of a run at its last measured step up to `step`. */
function recordAt(record, step) {
  let found = -1;
  record.steps.forEach((one, index) => {
    if (one <= step) found = index;
  });
  return found < 0 ? null : { step: record.steps[found], values: record.values[found] };
}

/** Return the steps at which a quantity by depth was measured in any drawn run. */
function depthSteps(comparison, choice, part) {
  const runs = drawnRuns(choice);
  const steps = new Set();
  for (const { key } of choice[part]) {
    for (const record of comparison[part][key] || []) {
      if (runs.has(record.run)) for (const step of record.steps) steps.add(step);
    }
  }
  return [...steps].sort((a, b) => a - b);
}

function drawnRuns(choice) {
  const items = drawnItems(choice).map(({ item }) => item);
  return new Set(items.flatMap((item) => item.runs ?? [item.index]));
}

/** Return the curves of a quantity by depth, each at the last step up to one of `steps`. */
function depthCurves(comparison, choice, part, key, steps) {
  const records = new Map((comparison[part][key] || []).map((one) => [one.run, one]));
  const items = drawnItems(choice);
  return items.flatMap(({ item, place }) => {
    const own = (item.runs ?? [item.index]).map((run) => records.get(run)).filter(Boolean);
    const curves = steps.map((step, index) => {
      const curve = curveAt(own, step, choice);
      if (!curve) return null;
      const name = item.label ?? item.name;
      const isOne = items.length === 1 && steps.length > 1;
      const when = steps.length > 1 ? `step ${curve.step}` : "";
      curve.name = isOne ? when : [name, when].filter(Boolean).join(", ");
      curve.look = steps.length > 1 ? lookOfStep(place, index, isOne) : lookAt(place);
      if (steps.length === 1 && curve.step !== step) {
        curve.note = `measured at step ${curve.step}`;
      }
      return curve;
    });
    // two of the steps may have the same measurement before them
    const known = new Set();
    return curves.filter((one) => one && !known.has(one.step) && known.add(one.step));
  });
}

/** Return the curve of records at a step, their mean where there are several. */
function curveAt(own, step, choice) {
  const read = own.map((record) => recordAt(record, step));
  const latest = Math.min(...read.map((at) => (at ? at.step : Infinity)));
  const same = own
    .map((record) => ({ record, at: recordAt(record, latest) }))
    .filter(({ record, at }) => at && at.step === latest && isLike(record, own[0]));
  if (!same.length) return null;
  return { ...depthCurve(same, choice), step: latest };
}

function isLike(record, other) {
  if (!record.sites || !other.sites) return true;
  return record.sites.join("\n") === other.sites.join("\n");
}

function depthCurve(same, choice) {
  const asShare = choice.across === "share";
  const all = same[0].record;
  // sites of one kind stand on an axis, all where the reader asks for them
  const axis = choice.everySite || !all.axis ? null : all.axis;
  const sites = axis && all.sites ? axis.map((place) => all.sites[place]) : all.sites;
  const columns = same.map(({ at }) =>
    axis ? axis.map((place) => at.values[place] ?? null) : at.values,
  );
  const count = sites ? sites.length : Math.min(...columns.map((c) => c.length));
  const last = Math.max(1, count - 1);
  const xs = [...Array(count).keys()].map((k) => (asShare ? k / last : k + 1));
  const labels = sites ? sites.map(String) : undefined;
  if (columns.length === 1) return curveOf("", null, xs, columns[0], { labels });
  const means = [];
  const spreads = [];
  for (let k = 0; k < count; k += 1) {
    const [mean, spread] = meanAndSpread(columns.map((column) => numeric(column[k])));
    means.push(mean);
    spreads.push(spread);
  }
  const curve = curveOf("", null, xs, means, { labels });
  addSpread(curve, spreads, means.map(() => columns.length));
  return curve;
}

/** Return the mean, and the spread as of a sample. */
function meanAndSpread(values) {
  const mean = values.reduce((sum, value) => sum + value, 0) / values.length;
  const squares = values.reduce((sum, value) => sum + (value - mean) ** 2, 0);
  return [mean, Math.sqrt(squares / (values.length - 1))];
}
