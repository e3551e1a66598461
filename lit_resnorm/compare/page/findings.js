// What was found, in words: one card a group of runs, the worst first.

const SEVERITIES = {
  bad: { rank: 0, word: "Bad", sign: "\u2715" },
  warn: { rank: 1, word: "Warning", sign: "!" },
  info: { rank: 2, word: "Note", sign: "i" },
  good: { rank: 3, word: "Good", sign: "\u2713" },
};
const CARDS_AT_FIRST = 12;
const LINES_AT_FIRST = 4;

function severityOf(finding) {
  return Object.hasOwn(SEVERITIES, finding.severity) ? finding.severity : "info";
}

function rankOf(finding) {
  return SEVERITIES[severityOf(finding)].rank;
}

/** Fill the section of findings. */
function showFindings(comparison, choice) {
  if (!comparison.findings.length) return;
  const section = opened("findings");
  const general = comparison.findings.filter((finding) => finding.run == null);
  section.append(html("p", { class: "lead" }, overview(comparison)));
  const { explanations } = comparison;
  const items = general.map((finding) => findingItem(explanations, finding));
  if (items.length) section.append(findingList(items));
  const cards = comparison.groups
    .map((group) => ({ group, findings: findingsOf(comparison, group) }))
    .filter(({ findings }) => findings.length)
    .sort((a, b) => rankOf(a.findings[0]) - rankOf(b.findings[0]))
    .map(({ group, findings }) => card(comparison, choice, group, findings));
  section.append(html("div", { class: "cards" }, ...cards.slice(0, CARDS_AT_FIRST)));
  const rest = cards.slice(CARDS_AT_FIRST);
  if (rest.length) {
    const more = html("summary", {}, `${rest.length} more`);
    section.append(html("details", {}, more, html("div", { class: "cards" }, ...rest)));
  }
}

function findingsOf(comparison, group) {
  return comparison.findings
    .filter((finding) => finding.run != null && group.runs.includes(finding.run))
    .sort((a, b) => rankOf(a) - rankOf(b));
}

function overview(comparison) {
  const worst = (severity) => {
    const found = comparison.findings.filter((f) => severityOf(f) === severity);
    return new Set(found.map((f) => f.run).filter((run) => run != null));
  };
  const bad = worst("bad");
  const warned = [...worst("warn")].filter((run) => !bad.has(run));
  const number = comparison.runs.length;
  const rest = number - bad.size - warned.length;
  const of = `of ${counted(number, "run")}`;
  const parts = [];
  if (bad.size) parts.push(`${bad.size} ${of} ${bad.size === 1 ? "is" : "are"} in trouble`);
  if (warned.length) parts.push(`${warned.length} with a warning`);
  if (rest) parts.push(`${rest} without a complaint`);
  return `${parts.join(", ")}.`;
}

function card(comparison, choice, group, findings) {
  const worst = severityOf(findings[0]);
  const runs = group.runs.map((run) => comparison.runs[run]).filter(Boolean);
  const isOne = runs.length === 1;
  const holder = html("span", { class: "holder" });
  choice.listen(() => {
    const index = choice.drawsGroups || !isOne ? group.index : runs[0].index;
    const fits = choice.drawsGroups || isOne;
    const place = fits ? choice.drawn.indexOf(index) : -1;
    holder.replaceChildren(swatch(place >= 0 ? lookAt(place) : null));
  });
  const title = html("h3", {}, holder, group.label, statusBadges(runs));
  const names = isOne ? runs[0].name : runs.map((run) => run.name).join(", ");
  const under = names === group.label ? null : html("p", { class: "soft under" }, names);
  const items = findings.map((finding) => {
    const { name } = comparison.runs[finding.run];
    return findingItem(comparison.explanations, finding, name, isOne ? "" : name);
  });
  return html("article", { class: `card ${worst}` }, title, under, findingList(items));
}

function statusBadges(runs) {
  const odd = runs.map((run) => run.status).filter((s) => s && s !== "finished");
  const badges = [...new Set(odd)].map((status) => {
    const number = odd.filter((other) => other === status).length;
    const count = runs.length > 1 ? ` ${number} of ${runs.length}` : "";
    return html("span", { class: "badge bad" }, `${status}${count}`);
  });
  return badges.length ? html("span", { class: "badges" }, ...badges) : null;
}

function findingList(items) {
  const list = (part) => html("ul", { class: "findings" }, ...part);
  const rest = items.slice(LINES_AT_FIRST);
  if (!rest.length) return list(items);
  const more = html("summary", {}, `${rest.length} more`);
  return html(
    "div",
    {},
    list(items.slice(0, LINES_AT_FIRST)),
    html("details", {}, more, list(rest)),
  );
}

/** Return a sentence without the name that already stands above or before it. */
function withoutName(text, name) {
  return name && text.startsWith(`${name}: `) ? text.slice(name.length + 2) : text;
}

/** Return what a finding means and what to do, folded; null where nothing is known. */
function explained(explanations, finding) {
  const own = Object.hasOwn(explanations, finding.name) ? explanations[finding.name] : null;
  if (!own) return null;
  const word = rankOf(finding) < SEVERITIES.info.rank ? "what to do" : "what it means";
  const summary = html("summary", {}, word, hidden(` (${own.title})`));
  const plain = (text) => String(text).replaceAll("`", "");
  const meaning = html("p", {}, plain(own.meaning));
  const lead = html("b", {}, "What to do: ");
  const isTold = own.advice && own.advice !== "Nothing.";
  const advice = isTold ? html("p", {}, lead, plain(own.advice)) : null;
  return html("details", { class: "explained" }, summary, meaning, advice);
}

function findingItem(explanations, finding, title = "", name = title) {
  const severity = severityOf(finding);
  const { word, sign } = SEVERITIES[severity];
  const source = finding.source
    ? html("span", { class: "source" }, ` ${finding.source}`)
    : null;
  return html(
    "li",
    { class: severity },
    html("span", { class: "sign", "aria-hidden": "true" }, sign),
    html(
      "span",
      {},
      hidden(`${word}: `),
      name ? html("b", {}, `${name}: `) : null,
      withoutName(String(finding.text ?? ""), title),
      source,
      explained(explanations, finding),
    ),
  );
}
