// The panel in which the reader chooses what is drawn.

/** Fill the panel. */
function showPicker(comparison, choice) {
  const panel = document.getElementById("picker");
  if (comparison.runs.length === 1) {
    // nothing to choose among
    panel.hidden = true;
    document.getElementById("charts").classList.add("alone");
    return;
  }
  panel.append(html("h2", {}, "What is drawn"));
  if (comparison.isGrouped) panel.append(kindOfItems(choice));
  const found = { text: "" };
  const list = html("div", { class: "items", role: "group", "aria-label": "Runs" });
  const note = html("p", { class: "soft" });
  panel.append(filterBox(found, () => fill()), buttons(choice, found), list, note);
  let listed = null;
  const fill = () => {
    const items = choice.items.filter((item) => matches(item, found.text));
    listed = { kind: choice.show, rows: items.map((item) => itemRow(item, choice)) };
    list.replaceChildren(...listed.rows.map((row) => row.label));
    update();
  };
  const update = () => {
    for (const row of listed.rows) row.update();
    const number = choice.drawn.filter((index) => index !== null).length;
    note.textContent = `${number} of ${choice.items.length} drawn`;
  };
  choice.listen(() => (listed?.kind === choice.show ? update() : fill()));
}

function matches(item, text) {
  return `${item.label ?? ""} ${item.name ?? ""}`.toLowerCase().includes(text);
}

function kindOfItems(choice) {
  const radios = ["groups", "runs"].map((kind) => {
    const radio = html("input", {
      type: "radio",
      name: "show",
      value: kind,
      change: () => choice.change((c) => (c.show = kind)),
    });
    const text = kind === "groups" ? "Groups: mean and spread" : "Single runs";
    choice.listen(() => (radio.checked = choice.show === kind));
    return html("label", { class: "check" }, radio, text);
  });
  const legend = html("legend", { class: "hidden" }, "Groups or single runs");
  return html("fieldset", { class: "plain" }, legend, ...radios);
}

function filterBox(found, fill) {
  const box = html("input", {
    type: "search",
    "aria-label": "Filter by name",
    placeholder: "Filter by name",
    input: () => {
      found.text = box.value.trim().toLowerCase();
      fill();
    },
  });
  return box;
}

function buttons(choice, found) {
  const button = (text, action) =>
    html("button", { type: "button", click: () => choice.change(action) }, text);
  const setAll = (on) => (c) => {
    for (const item of c.items) {
      const isDrawn = c.drawn.includes(item.index);
      if (matches(item, found.text) && isDrawn !== on) c.toggle(item.index, on);
    }
  };
  return html(
    "div",
    { class: "buttons" },
    button("Draw all", setAll(true)),
    button("Draw none", setAll(false)),
  );
}

function itemRow(item, choice) {
  const holder = html("span", { class: "holder" });
  const name = html("span", { class: "name" }, item.label ?? item.name);
  const more = item.label && item.runs.length > 1 ? ` (${item.runs.length})` : "";
  const { box, label } = checkbox(
    name,
    { change: () => choice.change((c) => c.toggle(item.index, box.checked)) },
    holder,
  );
  if (more) name.append(html("span", { class: "soft" }, more));
  const status = item.status && item.status !== "finished" ? item.status : null;
  if (status) name.append(" ", html("span", { class: "badge bad" }, status));
  const update = () => {
    const place = choice.drawn.indexOf(item.index);
    box.checked = place >= 0;
    holder.replaceChildren(swatch(place >= 0 ? lookAt(place) : null));
  };
  return { label, update };
}
