// The table of results: sorted by any column, groups with their runs below them.

const ROWS_UNFOLDED = 12;
/** Widest window, in pixels, in which a table is scrolled sideways. */
const NARROW = 900;

/** Fill the section of results. */
function showResults(comparison, choice) {
  if (!comparison.columns.length) return;
  const section = opened("results");
  const body = html("tbody", {});
  const heads = comparison.columns.map((column) => sortHead(column, comparison, choice));
  const name = sortHead({ key: "", title: "run", better: null }, comparison, choice);
  name.cell.className = "sticky";
  const head = html("tr", {}, name.cell, ...heads.map((one) => one.cell));
  const table = html("table", { class: "results" }, html("thead", {}, head), body);
  const unfolded = new Set(
    comparison.runs.length <= ROWS_UNFOLDED ? comparison.groups.map((g) => g.index) : [],
  );
  const best = bestRows(comparison);
  const box = scrolled("Results", table);
  let showsAll = false;
  const more = html("button", {
    type: "button",
    class: "add",
    click: () => {
      showsAll = !showsAll;
      fit();
    },
  });
  const fit = () => {
    const left = fitColumns(comparison, table, box, showsAll);
    more.hidden = !left && !showsAll;
    more.textContent = showsAll ? "Show fewer columns" : `Show ${left} more columns`;
  };
  const fill = () => {
    for (const one of [name, ...heads]) one.update();
    body.replaceChildren(...resultRows(comparison, choice, best, unfolded, fill));
    fit();
  };
  section.append(
    html("p", { class: "soft" }, legendOfResults(comparison)),
    box,
    more,
  );
  window.addEventListener("resize", fit);
  choice.listen(fill);
}

/** Hide the last columns of numbers until the table fits; return how many. */
function fitColumns(comparison, table, box, showsAll) {
  const show = (place, isShown) => {
    for (const row of table.rows) row.cells[place + 1].hidden = !isShown;
  };
  comparison.columns.forEach((_, place) => show(place, true));
  if (showsAll || window.innerWidth <= NARROW) return 0;
  let hiddenNumber = 0;
  for (let place = comparison.columns.length - 1; place >= 0; place -= 1) {
    if (table.scrollWidth <= box.clientWidth) break;
    const { key } = comparison.columns[place];
    // settings and words tell most
    if (!key.includes("/") || comparison.textColumns.has(key)) continue;
    show(place, false);
    hiddenNumber += 1;
  }
  return hiddenNumber;
}

function legendOfResults(comparison) {
  const spread = comparison.isGrouped
    ? " Groups show mean \u00b1 standard deviation (number of runs)."
    : "";
  return `\u2605 marks the best of a column. Click a column's name to sort.${spread}`;
}

function sortHead({ key, title, better }, comparison, choice) {
  const arrow = html("span", { class: "arrow", "aria-hidden": "true" });
  const firstDown = better === "high";
  const click = () =>
    choice.change((c) => {
      const again = c.sort?.column === (key || "name");
      c.sort = { column: key || "name", down: again ? !c.sort.down : firstDown };
    });
  const button = html("button", { type: "button", class: "head", click });
  const aim = { high: "higher is better", low: "lower is better" }[better];
  if (aim) button.append(hidden(`, ${aim}`));
  if (key && title !== key) button.title = aim ? `${key}, ${aim}` : key;
  const isText = !key || comparison.textColumns.has(key);
  // the arrow stands on the side where it moves no number off its column
  button.prepend(...(isText ? [title, arrow] : [arrow, title]));
  const cell = html("th", { scope: "col", class: isText ? "text" : null }, button);
  const update = () => {
    const isSorted = choice.sort?.column === (key || "name");
    const order = isSorted && (choice.sort.down ? "descending" : "ascending");
    cell.setAttribute("aria-sort", order || "none");
    arrow.textContent = isSorted ? (choice.sort.down ? "\u25bc" : "\u25b2") : "";
  };
  return { cell, update };
}

/** Return by column the rows (groups, or runs where no group has two) that are best. */
function bestRows(comparison) {
  const cells = comparison.isGrouped ? comparison.groupCells : comparison.runCells;
  const best = new Map();
  for (const { key, better } of comparison.columns) {
    const values = cells.map((row) => sortValue(row?.[key])).map((v) => [v].flat()[0]);
    const found = limits(values.filter((value) => typeof value === "number"));
    if (!better || !found || found[0] === found[1]) continue;
    const wanted = better === "high" ? found[1] : found[0];
    const rows = values.flatMap((value, index) => (value === wanted ? [index] : []));
    best.set(key, new Set(rows));
  }
  return best;
}

/** Return what a cell is sorted by: a number, or text. */
function sortValue(cell) {
  if (cell === null || cell === undefined) return null;
  if (typeof cell === "object") return sortValue(cell.mean);
  if (typeof cell === "number" || isBroken(cell)) return numeric(cell);
  return String(cell);
}

function inOrder(items, choice, cellOf) {
  if (!choice.sort) return items;
  const { column, down } = choice.sort;
  const value = (item) =>
    column === "name" ? (item.label ?? item.name) : sortValue(cellOf(item)?.[column]);
  const isAbsent = (one) => one === null || Number.isNaN(one);
  return [...items].sort((a, b) => {
    const [x, y] = [value(a), value(b)];
    // what wasn't measured stands last in both directions
    if (isAbsent(x) || isAbsent(y)) return isAbsent(x) - isAbsent(y);
    const words = typeof x === "string" || typeof y === "string";
    const order = words
      ? String(x).localeCompare(String(y), "en", { numeric: true })
      : x - y || 0;
    return down ? -order : order;
  });
}

function resultRows(comparison, choice, best, unfolded, fill) {
  const { runCells, groupCells } = comparison;
  const runRow = (run, isInner) => {
    const mark = isInner ? null : best;
    const text = (cell, digits) => cellText(cell, digits);
    const title = [drawnSwatch(choice, "runs", run), run.name];
    if (run.status && run.status !== "finished") {
      title.push(" ", html("span", { class: "badge bad" }, run.status));
    }
    if (run.logs) title.push(" ", html("span", { class: "soft" }, `${run.logs.length} logs`));
    const row = resultRow(comparison, runCells[run.index], run.index, mark, text, title);
    row.classList.toggle("inner", isInner);
    row.title = (run.logs ?? [run.source]).join("\n");
    return row;
  };
  if (!comparison.isGrouped) {
    const sorted = inOrder(comparison.runs, choice, (run) => runCells[run.index]);
    return sorted.map((run) => runRow(run, false));
  }
  const groups = inOrder(comparison.groups, choice, (g) => groupCells[g.index]);
  return groups.flatMap((group) => {
    const fold = foldButton(group, unfolded, fill);
    const title = [fold, drawnSwatch(choice, "groups", group), group.label];
    const cells = groupCells[group.index];
    const text = (cell, digits, key) => groupText(comparison, group, key, cell, digits);
    const row = resultRow(comparison, cells, group.index, best, text, title);
    row.classList.add("group");
    if (!unfolded.has(group.index)) return [row];
    const runs = group.runs.map((run) => comparison.runs[run]).filter(Boolean);
    const sorted = inOrder(runs, choice, (run) => runCells[run.index]);
    return [row, ...sorted.map((run) => runRow(run, true))];
  });
}

/** Return the look of what is drawn, in front of its name. */
function drawnSwatch(choice, kind, item) {
  const place = choice.show === kind ? choice.drawn.indexOf(item.index) : -1;
  return html("span", { class: "holder" }, swatch(place >= 0 ? lookAt(place) : null));
}

/** Return what stands in a group's cell: of texts and settings those of its runs. */
function groupText({ runCells }, group, key, cell, digits) {
  const own = group.runs.map((run) => runCells[run]?.[key] ?? null);
  const isSetting = !key.includes("/") && own.every((value) => value === own[0]);
  const isText = own.some((value) => typeof value === "string" && !isBroken(value));
  if (!isSetting && !isText) return spreadText(cell, digits);
  return [...new Set(own.map((value) => cellText(value, digits)))].join(", ");
}

function resultRow(comparison, cells, index, best, text, title) {
  const row = html("tr", {}, html("th", { scope: "row", class: "sticky" }, ...title));
  for (const { key, digits } of comparison.columns) {
    const isText = comparison.textColumns.has(key);
    const words = text(cells?.[key], digits || 4, key);
    const cell = html("td", { class: isText ? "text" : null }, words);
    if (best?.get(key)?.has(index)) {
      cell.classList.add("best");
      cell.prepend(html("span", { "aria-hidden": "true" }, "\u2605 "), hidden("best: "));
    }
    row.append(cell);
  }
  return row;
}

function foldButton(group, unfolded, fill) {
  const isOpen = unfolded.has(group.index);
  const id = `fold-${group.index}`;
  return html(
    "button",
    {
      type: "button",
      class: "fold",
      id,
      "aria-expanded": String(isOpen),
      "aria-label": `Runs of ${group.label}`,
      click: () => {
        if (!unfolded.delete(group.index)) unfolded.add(group.index);
        fill();
        document.getElementById(id).focus();
      },
    },
    isOpen ? "\u25be" : "\u25b8",
  );
}
