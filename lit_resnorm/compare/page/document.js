// The comparison, read out of the page itself and put into a form without gaps.

const NOT_FINITE = { NaN: NaN, Infinity: Infinity, "-Infinity": -Infinity };

/** Return a stored number; NaN where nothing was measured. */
function numeric(value) {
  if (typeof value === "number") return value;
  return Object.hasOwn(NOT_FINITE, value) ? NOT_FINITE[value] : NaN;
}

/** Return whether a stored value is a number that isn't finite, and not just absent. */
function isBroken(value) {
  return typeof value === "string" && Object.hasOwn(NOT_FINITE, value);
}

/** Return the document that the page holds. */
async function readDocument() {
  const holder = document.getElementById("comparison");
  if (holder.dataset.encoding !== "deflate") return JSON.parse(holder.textContent);
  if (typeof DecompressionStream === "undefined") {
    throw new Error(
      "This browser is too old for this page: it can't unpack the data" +
        " (Chrome 80, Firefox 113, Safari 16.4 and what came after can).",
    );
  }
  const text = atob(holder.textContent);
  const packed = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i += 1) packed[i] = text.charCodeAt(i);
  const stream = new Blob([packed]).stream();
  const unpacked = stream.pipeThrough(new DecompressionStream("deflate"));
  return new Response(unpacked).json();
}

/** Return spectra made of the series of their largest values, as `fim/top/01`. */
function rankedSeries(series) {
  const spectra = {};
  for (const key of Object.keys(series).sort()) {
    const match = /^(.+\/top)\/(\d+)$/.exec(key);
    if (!match) continue;
    const runs = (spectra[match[1]] ||= new Map());
    for (const { run, step, value } of series[key]) {
      if (!runs.has(run)) runs.set(run, new Map(step.map((one) => [one, []])));
      step.forEach((one, index) => {
        const values = runs.get(run).get(one);
        if (values) values[Number(match[2]) - 1] = value[index];
      });
    }
  }
  const records = (runs) =>
    [...runs].map(([run, byStep]) => ({
      run,
      steps: [...byStep.keys()],
      // Array.from fills the gaps that a rank without a value leaves
      values: [...byStep.values()].map((row) => Array.from(row, (one) => one ?? null)),
    }));
  return Object.fromEntries(
    Object.entries(spectra).map(([key, runs]) => [key, records(runs)]),
  );
}

/** Return the document with every part that the page uses. */
function complete(raw) {
  const runs = (raw.runs || []).map((run, index) => ({
    index,
    name: String(run.name ?? `run ${index + 1}`),
    source: run.source == null ? "" : String(run.source),
    logs: Array.isArray(run.logs) ? run.logs.map(String) : null,
    group: Number.isInteger(run.group) ? run.group : index,
    status: String(run.status ?? ""),
    verdicts: run.verdicts || {},
    seconds: run.seconds ?? null,
    config: run.config || {},
  }));
  const groups = (raw.groups || runs.map((run) => ({ label: run.name }))).map(
    (group, index) => ({
      index,
      label: String(group.label ?? `group ${index + 1}`),
      runs: group.runs || [index],
    }),
  );
  const table = raw.table || {};
  const isWord = (cell) => typeof cell === "string" && !isBroken(cell);
  const isText = ({ key }) => (table.runs || []).some((cells) => isWord(cells?.[key]));
  return {
    textColumns: new Set((raw.columns || []).filter(isText).map((column) => column.key)),
    title: String(raw.title ?? "Comparison of runs"),
    made: raw.made,
    version: raw.version,
    by: raw.by || [],
    skipped: raw.skipped || [],
    differences: raw.differences || [],
    same: raw.same || {},
    runs,
    groups,
    isGrouped: groups.some((group) => group.runs.length > 1),
    // the status stands beside the name
    columns: (raw.columns || []).filter((column) => column.key !== "status"),
    runCells: table.runs || [],
    groupCells: table.groups || [],
    series: raw.series || {},
    groupSeries: raw.group_series || {},
    depth: raw.depth || {},
    spectra: { ...rankedSeries(raw.series || {}), ...raw.spectra },
    findings: raw.findings || [],
    explanations: raw.explanations || {},
    quantities: { series: {}, depth: {}, ...raw.quantities },
  };
}

/** Return what a probe declared of a quantity, empty where none did. */
function declaredOf(comparison, section, key) {
  const { series, depth } = comparison.quantities;
  const own = Object.hasOwn;
  if (section === "depth") return own(depth, key) ? depth[key] : {};
  const name = section === "spectra" ? `${key}/01` : key;
  return own(series, name) ? series[name] : {};
}
