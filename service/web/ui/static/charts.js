// Drawings: lines over time, bars, and points beside a diagonal. Numbers stand beside them as text.

import { count, h, number, setText, svg } from "./dom.js";

const WINDOWS = { 30: "30 s ago", 60: "1 min ago", 120: "2 min ago" };
const WIDTH = 600;
const HEIGHT = 100;

/** A limit of an axis: the next of 1, 2, 5, 10, 20 and so on. */
function ceiling(value) {
  if (!(value > 0)) return 1;
  const power = 10 ** Math.floor(Math.log10(value));
  return power * [1, 2, 5, 10].find((factor) => factor * power >= value);
}

/** Areas over time, each on top of the one before. `series` are the names of values, which are classes as well. */
export class TimeChart {
  constructor(root, series, what) {
    this.series = series;
    this.what = what;
    this.areas = series.map((name) => svg("path", { class: `area ${name}` }));
    this.drawing = svg(
      "svg",
      { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", role: "img" },
      svg("path", { class: "rule", d: `M0 0H${WIDTH}M0 50H${WIDTH}M0 ${HEIGHT}H${WIDTH}` }),
      this.areas,
    );
    this.top = h("span", { class: "top" });
    root.classList.add("chart");
    this.start = h("span", { class: "start" });
    root.replaceChildren(this.drawing, this.top, this.start, h("span", { class: "end" }, "now"));
  }

  draw(points, now) {
    const sums = points.map((point) => this.series.reduce((sum, name) => sum + point[name], 0));
    const limit = ceiling(Math.max(0, ...sums));
    setText(this.top, count(limit));
    const age = points.length === 0 ? 0 : now - points[0].at;
    const span = Number(Object.keys(WINDOWS).find((seconds) => age <= seconds) ?? 120);
    setText(this.start, WINDOWS[span]);
    const x = points.map((point) => ((WIDTH * (point.at - now + span)) / span).toFixed(1));
    let below = points.map(() => 0);
    this.series.forEach((name, place) => {
      const above = points.map((point, index) => below[index] + point[name]);
      const line = (values) => values.map((value) => (HEIGHT * (1 - value / limit)).toFixed(1));
      const [upper, lower] = [line(above), line(below)];
      const there = x.map((each, index) => `${each} ${upper[index]}`).join("L");
      const back = x
        .map((each, index) => `${each} ${lower[index]}`)
        .reverse()
        .join("L");
      const isEmpty = points.length < 2 || points.every((point) => point[name] === 0);
      this.areas[place].setAttribute("d", isEmpty ? "" : `M${there}L${back}Z`);
      below = above;
    });
    const last = sums.length === 0 ? 0 : sums[sums.length - 1];
    this.drawing.setAttribute(
      "aria-label",
      `${this.what}: now ${number(last)}, at most ${number(Math.max(0, ...sums))} in the last ${span} seconds`,
    );
  }
}

/** Bars with a label each. */
export class Bars {
  constructor(root, labels, what) {
    this.root = root;
    this.what = what;
    this.labels = labels;
    this.bars = labels.map(() => h("i"));
    this.values = labels.map(() => h("b"));
    root.classList.add("bars");
    root.setAttribute("role", "img");
    root.replaceChildren(
      ...labels.map((label, place) =>
        h("span", { class: "bar-of" }, this.values[place], this.bars[place], h("span", {}, label)),
      ),
    );
  }

  draw(counts) {
    const all = counts.reduce((sum, each) => sum + each, 0);
    const most = Math.max(1, ...counts);
    counts.forEach((each, place) => {
      this.bars[place].style.height = `${Math.round((each / most) * 100)}%`;
      setText(this.values[place], each === 0 ? "" : `${Math.max(1, Math.round((each / all) * 100))}%`);
    });
    const told = this.labels
      .map((label, place) => `${label}: ${counts[place]}`)
      .filter((_, place) => counts[place] > 0);
    this.root.setAttribute("aria-label", `${this.what}. ${told.join(", ") || "No batch yet."}`);
  }
}

/** Points of what was predicted (right) and what it took (up), on logarithmic axes. */
export class Scatter {
  constructor(root) {
    this.points = svg("path", { class: "points" });
    this.drawing = svg(
      "svg",
      { viewBox: "0 0 100 100", preserveAspectRatio: "none", role: "img" },
      svg("path", { class: "rule", d: "M0 0V100H100" }),
      svg("path", { class: "diagonal", d: "M0 100L100 0" }),
      this.points,
    );
    this.limits = ["top", "start", "end"].map((place) => h("span", { class: place }));
    root.classList.add("chart", "square");
    root.replaceChildren(this.drawing, ...this.limits);
  }

  draw(pairs, format) {
    const values = pairs.flat();
    const [low, high] = [Math.min(...values), Math.max(...values)].map(Math.log10);
    const [from, to] = pairs.length === 0 ? [-3, -2] : [low - 0.08, high + 0.08];
    const place = (value) => (100 * (Math.log10(value) - from)) / (to - from);
    const d = pairs.map(
      ([predicted, actual]) => `M${place(predicted).toFixed(1)} ${(100 - place(actual)).toFixed(1)}h0`,
    );
    this.points.setAttribute("d", d.join(""));
    const texts =
      pairs.length === 0
        ? ["", "", ""]
        : [`took ${format(10 ** to)}`, format(10 ** from), `predicted ${format(10 ** to)}`];
    this.limits.forEach((limit, index) => setText(limit, texts[index]));
    this.drawing.setAttribute("aria-label", `Predicted and actual seconds of ${pairs.length} batches`);
  }
}
