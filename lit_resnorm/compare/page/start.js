// Puts the page together.

function showHeader(comparison) {
  const { runs, groups, made, version } = comparison;
  const parts = [counted(runs.length, "run")];
  if (comparison.isGrouped) parts.push(`in ${counted(groups.length, "group")}`);
  const seconds = runs.reduce((sum, run) => sum + (run.seconds || 0), 0);
  if (seconds) parts.push(`of ${durationText(seconds)} in all`);
  const date = String(made ?? "").replace("T", " ").replace(/(\.\d+)?\+00:00$/, " UTC");
  const by = `lit-resnorm${version ? ` ${version}` : ""}`;
  const text = `${parts.join(" ")}. Made${date ? ` ${date}` : ""} by ${by}.`;
  document.getElementById("made").textContent = text;
}

function showSkipped({ skipped }) {
  if (!skipped.length) return;
  const items = skipped.map(({ name, reason }) => {
    return html("li", {}, html("b", {}, String(name)), `: ${reason}`);
  });
  const summary = html("summary", {}, `${skipped.length} could not be read`);
  const open = skipped.length <= 5;
  const list = html("details", { open }, summary, html("ul", {}, ...items));
  document.querySelector("header.top").append(html("div", { class: "skipped" }, list));
}

function complain(error) {
  const box = document.getElementById("trouble");
  box.hidden = false;
  box.textContent += `${box.textContent ? " " : ""}${error.message}`;
  console.error(error);
}

async function start() {
  const comparison = complete(await readDocument());
  const choice = new Choice(comparison);
  document.getElementById("charts").hidden = false;
  const parts = [
    () => showHeader(comparison),
    () => showSkipped(comparison),
    () => showFindings(comparison, choice),
    () => showSettings(comparison),
    () => showResults(comparison, choice),
    () => showPicker(comparison, choice),
    ...SECTIONS.map((name) => () => showSection(comparison, choice, name)),
  ];
  for (const part of parts) {
    // a part of the document that can't be shown leaves the others readable
    try {
      part();
    } catch (error) {
      complain(error);
    }
  }
  performance.mark("ready");
  document.documentElement.dataset.ready = "true";
}

start().catch(complain);
