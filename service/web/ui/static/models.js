// The view of the models: whether each takes requests, what computes it and why, and its limits.

import { byId, h, number } from "./dom.js";

export class Models {
  constructor() {
    this.shown = "";
  }

  /** Show the models of a sample; they are drawn anew only where something has changed. */
  draw(models) {
    const told = Object.entries(models).map(([name, { readiness, problem, engine, limits }]) => ({
      name,
      readiness,
      problem,
      engine,
      limits,
    }));
    const text = JSON.stringify(told);
    if (text === this.shown) return;
    this.shown = text;
    byId("model-list").replaceChildren(...told.map(card));
  }
}

function card({ name, readiness, problem, engine, limits }) {
  return h(
    "article",
    { class: "panel model-card", "aria-label": name },
    h("div", { class: "heading" }, h("h3", {}, name), h("span", { class: `state ${readiness}` }, readiness)),
    problem && h("p", { class: "notice" }, problem),
    engine ? engineOf(engine) : h("p", { class: "caption" }, "Its class computes by itself: no engine was chosen."),
    limits && limitsOf(limits),
  );
}

function engineOf(engine) {
  const own = `${engine.engine} ${engine.dtype}`;
  const speeds = Object.entries(engine.speeds).sort(([, a], [, b]) => b - a);
  const most = Math.max(1, ...speeds.map(([, speed]) => speed));
  const compared = engine.samples ? ` The outputs of ${engine.samples} samples were compared.` : "";
  return h(
    "section",
    { "aria-label": `Engine of the model` },
    h("h4", {}, "Engine"),
    h("p", {}, h("strong", {}, own), `, ${engine.reason || "measured"}.${compared}`),
    speeds.length > 0 &&
      h(
        "table",
        { class: "speeds" },
        h("caption", { class: "caption" }, "Speed of what was measured, beside torch float32"),
        h(
          "tbody",
          {},
          speeds.map(([name, speed]) => speedRow(name, speed, most, name === own)),
        ),
      ),
    Object.entries(engine.refused).map(([name, why]) =>
      h("p", { class: "caption" }, h("strong", {}, name), ` was not taken: ${why}`),
    ),
    engine.unfinished.length > 0 &&
      h("p", { class: "caption" }, `Still to be measured at a later start: ${engine.unfinished.join(", ")}.`),
  );
}

function speedRow(name, speed, most, isOwn) {
  const bar = h("i", { class: isOwn ? "length interactive" : "length" });
  bar.style.width = `${Math.max(1, Math.round((100 * speed) / most))}%`;
  return h(
    "tr",
    {},
    h("th", { scope: "row" }, name, isOwn && h("span", { class: "tag" }, "runs")),
    h("td", { class: "of" }, bar),
    h("td", { class: "number" }, `${number(speed)} ×`),
  );
}

function limitsOf(limits) {
  return h(
    "section",
    { "aria-label": "Limits of batches" },
    h("h4", {}, "Limits of batches"),
    h(
      "dl",
      { class: "facts" },
      Object.entries(limits).map(([name, value]) =>
        h("div", {}, h("dt", { class: "mono" }, name), h("dd", {}, value === null ? "none" : String(value))),
      ),
    ),
  );
}
