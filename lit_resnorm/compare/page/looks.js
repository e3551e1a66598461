// How a curve is told from the others: colour, dashes and marks, each alone enough.

const NUM_COLOURS = 6;
const DASHES = ["", "7 3", "2 3", "9 3 2 3", "12 4"];

const MARKS = [
  "M-3.6 0a3.6 3.6 0 1 0 7.2 0a3.6 3.6 0 1 0 -7.2 0z",
  "M-3.2 -3.2h6.4v6.4h-6.4z",
  "M0 -4.2L4 3H-4z",
  "M0 -4.5L4.5 0L0 4.5L-4.5 0z",
  "M0 4.2L4 -3H-4z",
  "M-1.3 -4h2.6v2.7h2.7v2.6h-2.7v2.7h-2.6v-2.7h-2.7v-2.6h2.7z",
  "M-4 -2.2L-2.2 -4L0 -1.8L2.2 -4L4 -2.2L1.8 0L4 2.2L2.2 4L0 1.8L-2.2 4L-4 2.2L-1.8 0z",
];

/** Return the look of the curve at a place among those that are drawn. */
function lookAt(place) {
  return {
    place,
    colour: `k${place % NUM_COLOURS}`,
    dashes: DASHES[place % DASHES.length],
    mark: MARKS[place % MARKS.length],
  };
}

/** Return the look of one step among several: of a run alone, or of each of many. */
function lookOfStep(place, index, isOne) {
  const look = lookAt(place);
  return isOne ? lookAt(index) : { ...look, dashes: DASHES[index % DASHES.length] };
}

/** Return a short piece of a curve, for legends. */
function swatch(look) {
  const box = svg("svg", {
    class: `swatch ${look ? look.colour : ""}`,
    viewBox: "0 0 30 12",
    width: 30,
    height: 12,
    "aria-hidden": "true",
  });
  if (look) {
    box.append(
      svg("path", { class: "curve", d: "M1 6H29", "stroke-dasharray": look.dashes }),
      svg("path", { class: "mark", d: look.mark, transform: "translate(15 6)" }),
    );
  }
  return box;
}
