// A chart: a plot with a readout of exact values by pointer and keys, and as a table.

const HEIGHT = 250;
const MOST_ROWS = 200;

/** One chart; `describe` returns its name in words. */
class Chart {
  constructor() {
    this.plot = svg("svg", { class: "plot", tabindex: "0", role: "application" });
    this.plot.setAttribute("aria-roledescription", "chart");
    this.heading = html("p", { class: "readout-at" });
    this.legend = html("ul", { class: "legend" });
    this.tableButton = html(
      "button",
      { type: "button", "aria-expanded": "false", click: () => this.toggleTable() },
      "Show as table",
    );
    this.tableBox = html("div", { hidden: true });
    this.element = html("div", { class: "chart" }, this.plot, this.heading, this.legend);
    this.model = null;
    this.cursor = null;
    this.chosen = null;
    this.listen();
    new ResizeObserver(() => this.model && this.render()).observe(this.element);
  }

  listen() {
    this.plot.addEventListener("pointermove", (event) => this.point(event));
    this.plot.addEventListener("pointerdown", (event) => this.point(event));
    this.plot.addEventListener("pointerleave", (event) => {
      // what a finger has chosen stays to be read
      if (event.pointerType === "mouse") this.moveTo(null);
    });
    this.plot.addEventListener("keydown", (event) => this.press(event));
  }

  /** Show a model (see drawing.js); `xWord` names a place, as "step". */
  draw(model) {
    this.model = model;
    this.stops = [...new Set(model.curves.flatMap((curve) => [...curve.xs]))];
    this.stops.sort((a, b) => a - b);
    this.cursor = null;
    this.chosen = null;
    const words = `${model.name}, ${counted(model.curves.length, "curve")}.`;
    const keys = "Left and right arrow read the values, up and down choose a curve.";
    this.plot.setAttribute("aria-label", `${words} ${keys}`);
    this.rows = model.curves.map((curve, index) => this.legendRow(curve, index));
    this.legend.replaceChildren(...this.rows.map((row) => row.item));
    this.render();
    if (!this.tableBox.hidden) this.fillTable();
  }

  render() {
    const width = Math.round(this.element.clientWidth);
    if (!width) return;
    this.drawn = drawPlot(this.plot, this.model, width, HEIGHT);
    this.showCursor();
    this.showChosen();
  }

  legendRow(curve, index) {
    const value = html("span", { class: "value" });
    const place = html("span", { class: "soft" });
    const note = curve.note ? html("span", { class: "note" }, curve.note) : null;
    const button = html(
      "button",
      {
        type: "button",
        class: "key",
        "aria-pressed": "false",
        title: `Bring out ${curve.name}`,
        click: () => this.choose(this.chosen === index ? null : index),
      },
      swatch(curve.look),
      html("span", { class: "name" }, curve.name),
    );
    const item = html("li", {}, button, value, place, note);
    return { item, button, value, place };
  }

  point(event) {
    if (!this.drawn || !this.drawn.axes || !this.stops.length) return;
    const box = this.plot.getBoundingClientRect();
    const x = event.clientX - box.left;
    const pixels = this.stops.map(this.drawn.axes.x.at);
    this.moveTo(nearest(pixels, x));
  }

  press(event) {
    const last = this.stops.length - 1;
    const leap = Math.max(1, Math.round(last / 10));
    const from = this.cursor ?? last + 1;
    const stops = {
      ArrowLeft: from - 1,
      ArrowRight: this.cursor === null ? 0 : from + 1,
      PageDown: from - leap,
      PageUp: from + leap,
      Home: 0,
      End: last,
    };
    const number = this.model.curves.length;
    if (event.key in stops && last >= 0) {
      this.moveTo(Math.max(0, Math.min(last, stops[event.key])));
      say(this.spoken());
    } else if (event.key === "ArrowDown" && number) {
      this.choose(((this.chosen ?? -1) + 1) % number);
    } else if (event.key === "ArrowUp" && number) {
      this.choose(((this.chosen ?? 0) - 1 + number) % number);
    } else if (event.key === "Escape") {
      this.moveTo(null);
      this.choose(null);
    } else return;
    event.preventDefault();
  }

  choose(index) {
    this.chosen = index;
    this.showChosen();
    if (index !== null) say(`${this.model.curves[index].name}. ${this.spoken()}`);
  }

  showChosen() {
    const { lines } = this.drawn || { lines: [] };
    lines.forEach((line, index) => {
      const faded = this.chosen !== null && this.chosen !== index;
      for (const part of [line.group, line.band]) part?.classList.toggle("faded", faded);
    });
    this.rows.forEach((row, index) => {
      row.button.setAttribute("aria-pressed", String(this.chosen === index));
    });
  }

  moveTo(stop) {
    this.cursor = stop;
    this.showCursor();
  }

  /** Return for each curve the index of the point that is read. */
  read() {
    const { curves } = this.model;
    if (this.cursor === null) return curves.map((curve) => curve.xs.length - 1);
    const x = this.stops[this.cursor];
    return curves.map((curve) => (curve.xs.length ? nearest(curve.xs, x) : -1));
  }

  showCursor() {
    const { model, drawn } = this;
    const points = this.read();
    const x = this.cursor === null ? null : this.stops[this.cursor];
    const ends = new Set(model.curves.map((curve, i) => curve.xs[points[i]]));
    const end = ends.size === 1 ? [...ends][0] : undefined;
    const at = x === null ? restText(model, end) : model.at(x);
    const labels = new Set(model.curves.map((curve, i) => curve.labels?.[points[i]]));
    const [label] = labels;
    const isShared = labels.size === 1 && label !== undefined;
    const read = x ?? end;
    this.heading.textContent = isShared ? `${at}: ${label}` : at;
    model.curves.forEach((curve, index) => {
      const point = points[index];
      const { value, place } = this.rows[index];
      value.textContent = valueText(curve, point);
      const own = curve.labels?.[point];
      if (own !== undefined) place.textContent = isShared ? "" : own;
      else place.textContent = curve.xs[point] === read ? "" : model.at(curve.xs[point]);
    });
    const cursor = drawn?.axes && this.plot.querySelector(".cursor");
    if (!cursor) return;
    cursor.replaceChildren();
    if (x === null) return;
    const { inner, axes, lines } = drawn;
    const across = axes.x.at(x).toFixed(1);
    cursor.append(svg("path", { d: `M${across} ${inner.top}V${inner.bottom}` }));
    lines.forEach((line, index) => {
      const [px, py] = [line.xs[points[index]], line.ys[points[index]]];
      if (!Number.isFinite(px) || !Number.isFinite(py)) return;
      const { colour } = model.curves[index].look;
      cursor.append(svg("circle", { class: colour, cx: px, cy: py, r: 5 }));
    });
  }

  /** Return what is read, as a sentence. */
  spoken() {
    const points = this.read();
    const values = this.model.curves.map((curve, index) => {
      if (this.chosen !== null && this.chosen !== index) return null;
      return `${curve.name} ${valueText(curve, points[index])}`;
    });
    return `${this.heading.textContent}: ${values.filter(Boolean).join(", ")}`;
  }

  toggleTable() {
    const open = this.tableBox.hidden;
    this.tableBox.hidden = !open;
    this.tableButton.setAttribute("aria-expanded", String(open));
    this.tableButton.textContent = open ? "Hide the table" : "Show as table";
    if (open) this.fillTable();
  }

  fillTable() {
    this.tableBox.replaceChildren(...valueTable(this.model, this.stops));
  }
}

function restText(model, end) {
  return end === undefined ? model.atRest : `${model.atRest}, ${model.at(end)}`;
}

function valueText(curve, point) {
  if (!(point >= 0)) return NOTHING;
  if (curve.missing?.has(point)) return NOTHING;
  const number = shown(curve.ys[point], 5);
  const word = curve.codes?.[curve.ys[point]];
  const value = word ? `${number} (${word})` : number;
  if (!curve.spreads) return value;
  const [spread, count] = [curve.spreads[point], curve.counts[point]];
  const around = Number.isFinite(spread) && count > 1 ? ` \u00b1 ${shown(spread, 2)}` : "";
  return `${value}${around} (${count})`;
}
