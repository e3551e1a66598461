// Where the configs of the runs differ, and what they share.

const MOST_COLUMNS = 8;
const MOST_VALUES = 12;

/** Fill the section of settings. */
function showSettings(comparison) {
  const { differences, same, runs, by } = comparison;
  const shared = Object.entries(same);
  if (!differences.length && !shared.length) return;
  const section = opened("settings");
  if (comparison.isGrouped && by.length) {
    const text = `Runs that agree in ${by.join(", ")} are one group.`;
    section.append(html("p", { class: "soft" }, text));
  }
  if (differences.length) {
    const table = runs.length <= MOST_COLUMNS ? byRun(comparison) : byValue(comparison);
    section.append(scrolled("Settings that differ", table));
  } else if (runs.length > 1) {
    section.append(html("p", {}, "All runs have the same settings."));
  } else {
    section.querySelector("h2").textContent = "Settings";
  }
  if (!shared.length) return;
  const where = runs.length > 1 ? " that all runs share" : "";
  const summary = html("summary", {}, `${counted(shared.length, "setting")}${where}`);
  const rows = shared.map(([key, value]) =>
    html("tr", {}, rowHead(key), html("td", {}, settingText(value))),
  );
  const table = html("table", { class: "left" }, html("tbody", {}, ...rows));
  const box = scrolled(`Settings${where}`, table);
  section.append(html("details", {}, summary, box));
}

function rowHead(text, className) {
  return html("th", { scope: "row", class: className }, text);
}

function columnHead(text) {
  return html("th", { scope: "col" }, text);
}

function byRun({ differences, runs }) {
  const head = html(
    "tr",
    {},
    columnHead("setting"),
    ...runs.map((run) => columnHead(run.name)),
  );
  const rows = differences.map(({ key, values }) =>
    html(
      "tr",
      {},
      rowHead(String(key), "sticky"),
      ...runs.map((run) => html("td", {}, settingText((values || [])[run.index]))),
    ),
  );
  return html(
    "table",
    { class: "left" },
    html("thead", {}, head),
    html("tbody", {}, ...rows),
  );
}

function byValue({ differences }) {
  const rows = differences.map(({ key, values }) => {
    const counts = new Map();
    for (const value of values || []) {
      const text = settingText(value);
      counts.set(text, (counts.get(text) || 0) + 1);
    }
    const listed = [...counts].slice(0, MOST_VALUES).map(([text, count]) => {
      const number = html("span", { class: "soft" }, ` ${counted(count, "run")}`);
      return html("span", { class: "chip" }, text, number);
    });
    const rest = counts.size - listed.length;
    const more = rest > 0 ? html("span", { class: "soft" }, `and ${rest} more`) : null;
    return html(
      "tr",
      {},
      rowHead(String(key), "sticky"),
      html("td", {}, ...listed, more),
    );
  });
  const head = html("tr", {}, columnHead("setting"), columnHead("values"));
  return html(
    "table",
    { class: "left" },
    html("thead", {}, head),
    html("tbody", {}, ...rows),
  );
}
