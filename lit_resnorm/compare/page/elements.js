// Elements of the page. Text goes in as text, never as markup.

const SVG = "http://www.w3.org/2000/svg";

function filled(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes || {})) {
    if (typeof value === "function") node.addEventListener(name, value);
    else if (value === true) node.setAttribute(name, "");
    else if (value !== false && value != null) node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child != null));
  return node;
}

/** Return an HTML element; functions among the attributes listen to events. */
function html(tag, attributes, ...children) {
  return filled(document.createElement(tag), attributes, children);
}

/** Return an SVG element. */
function svg(tag, attributes, ...children) {
  return filled(document.createElementNS(SVG, tag), attributes, children);
}

/** Return text that only screen readers show. */
function hidden(text) {
  return html("span", { class: "hidden" }, text);
}

/** Let screen readers say something. */
function say(text) {
  document.getElementById("spoken").textContent = text;
}

/** Return a section of the page, made visible. */
function opened(id) {
  const section = document.getElementById(id);
  section.hidden = false;
  return section;
}

/** Return a box that scrolls sideways, and can be scrolled by keyboard. */
function scrolled(label, content) {
  return html(
    "div",
    { class: "scroll", tabindex: "0", role: "region", "aria-label": label },
    content,
  );
}

let numberOfIds = 0;

/** Return an id that no other element has. */
function freshId(word) {
  numberOfIds += 1;
  return `${word}-${numberOfIds}`;
}

/** Return a labelled checkbox. */
function checkbox(label, attributes, ...marks) {
  const box = html("input", { type: "checkbox", ...attributes });
  return { box, label: html("label", { class: "check" }, box, ...marks, label) };
}
