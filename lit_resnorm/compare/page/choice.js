// What the reader has chosen. It is kept in the address, after the "#".

const DRAWN_AT_FIRST = 10;
const CHARTS_AT_FIRST = 4;
const SECTIONS = ["training", "depth", "spectra"];

/** Hold the choices; tell those who listen when one changes. */
class Choice {
  constructor(comparison) {
    this.comparison = comparison;
    this.listeners = [];
    this.read();
    window.addEventListener("hashchange", () => {
      if (location.hash !== this.written) {
        this.read();
        this.tell();
      }
    });
  }

  /** Call `listener` now and after each change. */
  listen(listener) {
    this.listeners.push(listener);
    listener();
  }

  /** Change something and let it be seen. */
  change(action) {
    action(this);
    this.write();
    this.tell();
  }

  tell() {
    for (const listener of this.listeners) listener();
  }

  /** Whether single runs are drawn, or groups with their spread. */
  get drawsGroups() {
    return this.show === "groups";
  }

  /** The runs or groups among which is chosen. */
  get items() {
    const { groups, runs } = this.comparison;
    return this.drawsGroups ? groups : runs;
  }

  /** Indices of those that are drawn, in the order of their looks. */
  get drawn() {
    return this.drawsGroups ? this.groups : this.runs;
  }

  set drawn(indices) {
    this[this.drawsGroups ? "groups" : "runs"] = indices;
  }

  /** Draw a run or group, or don't. */
  toggle(index, on) {
    const kept = this.drawn.map((other) => (other === index ? null : other));
    const free = kept.indexOf(null);
    if (on && free >= 0) kept[free] = index;
    else if (on) kept.push(index);
    while (kept.length && kept[kept.length - 1] === null) kept.pop();
    this.drawn = kept;
  }

  read() {
    const { comparison } = this;
    const words = new URLSearchParams(location.hash.slice(1));
    const grouped = comparison.isGrouped;
    this.show = grouped && words.get("show") !== "runs" ? "groups" : "runs";
    const first = (items) => items.slice(0, DRAWN_AT_FIRST).map((item) => item.index);
    this.runs = indices(words.get("runs"), comparison.runs) ?? first(comparison.runs);
    this.groups =
      indices(words.get("groups"), comparison.groups) ?? first(comparison.groups);
    const [column, direction] = (words.get("sort") || "").split("~");
    this.sort = column ? { column, down: direction === "down" } : null;
    this.at = /^\d+$/.test(words.get("step") || "") ? Number(words.get("step")) : null;
    const single = comparison.runs.length === 1;
    this.several = words.has("several") ? words.get("several") === "yes" : single;
    this.across = words.get("across") === "share" ? "share" : "place";
    this.everySite = words.get("sites") === "all";
    for (const section of SECTIONS) {
      const known = keysOf(comparison, section);
      const given = words.getAll(section).map(chartOf);
      const kept = given.filter((chart) => known.includes(chart.key));
      this[section] = kept.length || words.has(section) ? kept : atFirst(comparison, section);
    }
  }

  write() {
    const words = new URLSearchParams();
    words.set("show", this.show);
    for (const kind of ["runs", "groups"]) {
      words.set(kind, this[kind].map((index) => index ?? "").join("."));
    }
    if (this.sort) words.set("sort", `${this.sort.column}~${this.sort.down ? "down" : "up"}`);
    if (this.at !== null) words.set("step", this.at);
    if (this.several !== (this.comparison.runs.length === 1)) {
      words.set("several", this.several ? "yes" : "no");
    }
    if (this.across !== "place") words.set("across", this.across);
    if (this.everySite) words.set("sites", "all");
    for (const section of SECTIONS) {
      const charts = this[section];
      for (const { key, x, y } of charts) words.append(section, `${key}~${x}~${y}`);
      if (!charts.length) words.append(section, "");
    }
    this.written = `#${words}`;
    history.replaceState(null, "", this.written);
  }
}

function indices(text, items) {
  if (text === null) return null;
  if (text === "") return [];
  const read = text.split(".").map((word) => (/^\d+$/.test(word) ? Number(word) : null));
  const valid = read.map((index) => (index !== null && index < items.length ? index : null));
  return valid.filter((index, place) => index === null || valid.indexOf(index) === place);
}

function chartOf(text) {
  const [key, x, y] = text.split("~");
  const axis = (word, otherwise) =>
    word === "log" || word === "linear" ? word : otherwise;
  return { key, x: axis(x, "linear"), y: axis(y, "auto") };
}

/** Return the quantities that a section can draw. */
function keysOf(comparison, section) {
  const part = section === "training" ? comparison.series : comparison[section];
  return Object.keys(part).sort();
}

// each line: what is looked for first, and what does instead
const LIKED = {
  training: [[/^val.*loss/, /loss/], [/^val.*acc/, /acc/], [/train.*loss/]],
  depth: [],
  spectra: [],
};

/** Return the charts that are shown before the reader chooses. */
function atFirst(comparison, section) {
  const known = keysOf(comparison, section);
  const part = section === "training" ? "series" : section;
  const isMain = (key) => !/\/(seconds|failed|stderr|residual)$/.test(key);
  const isCurve = (key) =>
    section !== "training" || comparison.series[key].some((one) => one.step.length > 1);
  const keys = known.filter(
    (key) => isMain(key) && isCurve(key) && constantOf(comparison, section, key) === null,
  );
  const firstOf = (pattern) => keys.find((key) => pattern.test(key));
  const liked = LIKED[section].map((patterns) => patterns.map(firstOf).find(Boolean));
  // then what probes declare to be worth a chart, in the order in which they do
  const declared = Object.keys(comparison.quantities[part] || {});
  const charts = declared.filter(
    (key) => keys.includes(key) && comparison.quantities[part][key].has_chart,
  );
  const rest = known.filter((key) => constantOf(comparison, section, key) === null);
  const ordered = new Set([...liked.filter(Boolean), ...charts, ...keys, ...rest]);
  const most = section === "spectra" ? 1 : CHARTS_AT_FIRST;
  const x = section === "spectra" ? "log" : "linear";
  return [...ordered].slice(0, most).map((key) => ({ key, x, y: "auto" }));
}

/** Return the numbers of a quantity in one run, whatever the section. */
function numbersOf(section, one) {
  if (section === "training") return one.value;
  return one.values.flat().filter((value) => value !== null);
}

/** Return the value that a quantity has at every step and site of each run, or null.
 *
 * Maps the values to the runs that have them. A value that was measured once over
 * training is no constant.
 */
function constantOf(comparison, section, key) {
  const part = section === "training" ? comparison.series : comparison[section];
  const values = new Map();
  for (const one of part[key]) {
    const numbers = numbersOf(section, one).map(numeric);
    if (numbers.length < 2) return null;
    // not every: NaN equals nothing
    if (numbers.some((value) => value !== numbers[0])) return null;
    values.set(numbers[0], [...(values.get(numbers[0]) || []), one.run]);
  }
  return values.size ? values : null;
}

/** Return in words what is constant in each run, empty where nothing is. */
function constantsInWords(comparison, section) {
  const told = [];
  for (const key of keysOf(comparison, section)) {
    const values = constantOf(comparison, section, key);
    if (values === null) continue;
    const { title, codes } = declaredOf(comparison, section, key);
    const word = (value) => codes?.[value] || String(Number(value.toPrecision(4)));
    const known = [...values.keys()].sort((a, b) => a - b);
    const few = known.slice(0, 3).map(word).join(", ") + (known.length > 3 ? ", ..." : "");
    told.push(`${title ?? key} ${few}${known.length > 1 ? " (by run)" : ""}`);
  }
  return told.length ? `The same throughout each run: ${told.join("; ")}.` : "";
}
