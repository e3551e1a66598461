// The sections of charts: the reader adds, changes and removes charts.

const SECTION_OF = {
  training: { across: "step", canLogAcross: true },
  depth: { across: "site", canLogAcross: false },
  spectra: { across: "rank", canLogAcross: true },
};

/** Fill one section of charts, where there is something to draw. */
function showSection(comparison, choice, name) {
  const keys = keysOf(comparison, name);
  if (!keys.length) return;
  const section = opened(name);
  const controls = name === "training" ? null : stepControls(comparison, choice, name);
  const grid = html("div", { class: "grid-of-charts" });
  const where = section.querySelector("h2").textContent.toLowerCase();
  const add = html("button", { type: "button", class: "add" }, "Add a chart");
  add.setAttribute("aria-description", where);
  add.addEventListener("click", () => {
    const used = choice[name].map((chart) => chart.key);
    const key = keys.find((one) => !used.includes(one)) ?? keys[0];
    choice.change((c) => c[name].push({ key, x: "linear", y: "auto" }));
    grid.lastElementChild.querySelector("select").focus();
  });
  const constants = constantsInWords(comparison, name);
  if (constants) section.append(html("p", { class: "soft constant" }, constants));
  section.append(...(controls ? [controls.element] : []), grid, add);
  const panels = [];
  choice.listen(() => {
    controls?.update();
    while (panels.length > choice[name].length) panels.pop().element.remove();
    while (panels.length < choice[name].length) {
      const panel = new Panel(comparison, choice, name, panels.length, keys, add);
      panels.push(panel);
      grid.append(panel.element);
    }
    for (const panel of panels) panel.update();
  });
}

/** A chart with the controls that say what it shows. */
class Panel {
  constructor(comparison, choice, section, index, keys, add) {
    Object.assign(this, { comparison, choice, section, index });
    this.chart = new Chart();
    const change = (action) => choice.change((c) => action(c[section][index]));
    this.select = html(
      "select",
      {
        "aria-label": "Quantity",
        change: () =>
          change((one) => Object.assign(one, { key: this.select.value, y: "auto" })),
      },
      ...grouped(keys),
    );
    this.logX = checkbox(`log ${SECTION_OF[section].across}s`, {
      change: () => change((one) => (one.x = this.logX.box.checked ? "log" : "linear")),
    });
    this.logY = checkbox("log values", {
      change: () => change((one) => (one.y = this.logY.box.checked ? "log" : "linear")),
    });
    this.remove = html(
      "button",
      {
        type: "button",
        class: "remove",
        click: () => {
          choice.change((c) => c[section].splice(index, 1));
          add.focus();
        },
      },
      "Remove",
    );
    this.title = html("p", { class: "soft title" });
    const canLog = SECTION_OF[section].canLogAcross;
    const bar = html("div", { class: "bar" }, this.select);
    if (canLog) bar.append(this.logX.label);
    bar.append(this.logY.label);
    const foot = html("div", { class: "bar" }, this.chart.tableButton, this.remove);
    this.element = html(
      "figure",
      { class: "panel" },
      bar,
      this.title,
      this.chart.element,
      foot,
      this.chart.tableBox,
    );
  }

  update() {
    const chart = this.choice[this.section][this.index];
    this.select.value = chart.key;
    const { title } = declaredOf(this.comparison, this.section, chart.key);
    this.title.textContent = title ?? "";
    const model = modelOf(this.comparison, this.choice, this.section, chart);
    this.logX.box.checked = model.xKind !== "linear";
    this.logY.box.checked = model.yKind === "log";
    this.element.dataset.title = chart.key;
    this.element.setAttribute("aria-label", `Chart of ${chart.key}`);
    this.chart.tableButton.setAttribute("aria-description", chart.key);
    this.remove.setAttribute("aria-label", `Remove the chart of ${chart.key}`);
    const seen = JSON.stringify([chart, this.choice.show, this.choice.drawn]);
    const { comparison, choice, section } = this;
    const step = section === "training" ? "" : stepsOf(comparison, choice, section);
    const state = `${seen} ${step} ${this.choice.across} ${this.choice.everySite}`;
    // a change elsewhere leaves the reader's place in this chart alone
    if (state !== this.state) this.chart.draw(model);
    this.state = state;
  }
}

/** Return the options of a select, by the first part of their names. */
function grouped(keys) {
  const parts = new Map();
  for (const key of keys) {
    const part = key.includes("/") ? key.split("/")[0] : "";
    parts.set(part, [...(parts.get(part) || []), key]);
  }
  return [...parts].flatMap(([part, own]) => {
    const options = own.map((key) => html("option", { value: key }, key));
    return part ? [html("optgroup", { label: part }, ...options)] : options;
  });
}

function modelOf(comparison, choice, section, chart) {
  const { across } = SECTION_OF[section];
  const isTraining = section === "training";
  const asShare = section === "depth" && choice.across === "share";
  const curves = isTraining
    ? trainingCurves(comparison, choice, chart.key)
    : depthCurves(comparison, choice, section, chart.key, stepsOf(comparison, choice, section));
  const values = curves.flatMap((curve) => curve.ys);
  const { scale, codes } = declaredOf(comparison, section, chart.key);
  const isLog = chart.y === "auto" ? fitsLog(values, scale) : chart.y === "log";
  for (const curve of curves) if (codes && !curve.spreads) curve.codes = codes;
  if (isLog) curves.forEach(noteWhatIsLeftOut);
  const logKind = isTraining ? "count" : "log";
  return {
    name: chart.key,
    curves,
    across,
    xKind: chart.x === "log" ? logKind : "linear",
    yKind: isLog ? "log" : "linear",
    fromZero: isTraining,
    xTitle:
      section === "depth" && !asShare
        ? `${siteWord(comparison, choice, chart.key)}, in the order of execution`
        : titleAcross(section, curves.some((curve) => curve.thinned)),
    atRest: isTraining ? "last value" : `at the last ${across}`,
    at: (x) => (asShare ? `depth ${shown(x, 3)}` : `${across} ${x}`),
    nothing: choice.drawn.some((index) => index !== null)
      ? "not measured in what is drawn"
      : "nothing is chosen",
  };
}

function noteWhatIsLeftOut(curve) {
  if (!curve.ys.some((value) => value <= 0)) return;
  const note = "0 and what is below it is not drawn on this axis";
  curve.note = [curve.note, note].filter(Boolean).join("; ");
}

/** Return the steps at which by-depth charts are read: one, or some from first to last. */
function stepsOf(comparison, choice, part) {
  const steps = depthSteps(comparison, choice, part);
  const last = steps.length - 1;
  if (!choice.several) return [choice.at ?? steps[0] ?? 0];
  const number = drawnItems(choice).length;
  const most = Math.min(steps.length, number === 1 ? 6 : number <= 4 ? 3 : 2);
  if (most < 2) return steps;
  return Array.from({ length: most }, (_, k) => steps[Math.round((k * last) / (most - 1))]);
}

/** Return what the sites on a chart's axis are: "residual addition", "activation" ... */
function siteWord(comparison, choice, key) {
  const runs = drawnRuns(choice);
  const drawn = (comparison.depth[key] || []).filter((record) => runs.has(record.run));
  const words = new Set(
    drawn.map((one) => (choice.everySite && one.axis ? "site" : one.across || "site")),
  );
  return words.size === 1 ? [...words][0] : "site";
}

function titleAcross(section, isThinned) {
  const thinned = isThinned ? " (long curves thinned: extremes are kept)" : "";
  if (section === "training") return `optimizer step${thinned}`;
  if (section === "spectra") return "rank, largest first";
  return "share of the depth";
}

/** Return the slider of steps and, by depth, what stands across. */
function stepControls(comparison, choice, part) {
  const id = freshId("slider");
  const shownStep = html("b", { "aria-hidden": "true" });
  let steps = [];
  const move = () => {
    const place = Number(slider.value);
    choice.change((c) => (c.at = place === 0 ? null : steps[place]));
  };
  const slider = html("input", { type: "range", id, min: "0", step: "1", input: move });
  const words = html("label", { for: id }, "Measured at step");
  const label = html("span", { class: "slider" }, words, shownStep, slider);
  const several = checkbox("several steps", {
    change: () => choice.change((c) => (c.several = several.box.checked)),
  });
  const element = html("div", { class: "bar" }, label, several.label);
  let share = null;
  let every = null;
  if (part === "depth") {
    share = checkbox("across: share of the depth", {
      change: () =>
        choice.change((c) => (c.across = share.box.checked ? "share" : "place")),
    });
    element.append(share.label);
    const records = Object.values(comparison.depth).flat();
    if (records.some((record) => record.axis)) {
      every = checkbox("all sites", {
        change: () => choice.change((c) => (c.everySite = every.box.checked)),
      });
      element.append(every.label);
    }
  }
  const update = () => {
    steps = depthSteps(comparison, choice, part);
    const place = choice.at === null ? 0 : lastUpTo(steps, choice.at);
    slider.max = String(Math.max(0, steps.length - 1));
    slider.value = String(place);
    slider.disabled = steps.length < 2 || choice.several;
    several.box.checked = choice.several;
    const text = steps.length ? `${steps[Math.max(0, place)]}` : NOTHING;
    const isStart = steps[place] === 0;
    shownStep.textContent = isStart ? `${text} (initialisation)` : text;
    if (choice.several) {
      shownStep.textContent = stepsOf(comparison, choice, part).join(", ");
    }
    slider.setAttribute("aria-valuetext", `step ${text}`);
    if (share) share.box.checked = choice.across === "share";
    if (every) every.box.checked = choice.everySite;
  };
  return { element, update };
}

function lastUpTo(steps, step) {
  const after = steps.findIndex((one) => one > step);
  return after < 0 ? steps.length - 1 : Math.max(0, after - 1);
}
