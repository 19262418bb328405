// Elements, and how numbers are written. Texts of the service become text nodes only: none of them is ever read as HTML.

const SVG = "http://www.w3.org/2000/svg";

export const byId = (id) => document.getElementById(id);

/** An element. Attributes that are functions listen; those that are null or false are left out. */
export function h(tag, attributes, ...children) {
  return filled(document.createElement(tag), attributes, children);
}

/** An element of a drawing. */
export function svg(tag, attributes, ...children) {
  return filled(document.createElementNS(SVG, tag), attributes, children);
}

function filled(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes ?? {})) {
    if (typeof value === "function") element.addEventListener(name, value);
    else if (value !== null && value !== undefined && value !== false) {
      element.setAttribute(name, value === true ? "" : value);
    }
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

/** Set a text where it has changed: an unchanged one costs no layout, and is not read out again. */
export function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

/** Buttons of which one is pressed; `choose` is called with its value. Returns what presses another. */
export function choices(root, options, choose) {
  const buttons = new Map(
    Object.entries(options).map(([value, label]) => [
      value,
      h("button", { type: "button", class: "chip", "data-value": value, click: () => choose(value) }, label),
    ]),
  );
  root.replaceChildren(...buttons.values());
  return (chosen) => buttons.forEach((button, value) => button.setAttribute("aria-pressed", value === chosen));
}

const plain = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const precise = new Intl.NumberFormat("en", { maximumSignificantDigits: 3 });
const compact = new Intl.NumberFormat("en", { notation: "compact", maximumSignificantDigits: 3 });

export function count(value) {
  return Math.abs(value) < 100_000 ? plain.format(value) : compact.format(value);
}

export function number(value) {
  return Math.abs(value) < 1000 ? precise.format(value) : count(value);
}

export function percent(share) {
  return `${precise.format(Math.round(share * 1000) / 10)} %`;
}

export function duration(seconds) {
  if (seconds === 0) return "0 s";
  if (seconds < 0.001) return `${precise.format(seconds * 1e6)} µs`;
  if (seconds < 1) return `${precise.format(seconds * 1000)} ms`;
  if (seconds < 90) return `${precise.format(seconds)} s`;
  if (seconds < 5400) return `${plain.format(seconds / 60)} min`;
  if (seconds < 36 * 3600) return `${precise.format(seconds / 3600)} h`;
  return `${plain.format(seconds / 86400)} d`;
}

/** How long ago a time was. */
export function ago(iso) {
  const seconds = (Date.now() - new Date(iso).getTime()) / 1000;
  return seconds < 1 ? "just now" : `${duration(Math.floor(seconds))} ago`;
}

export function json(value) {
  return JSON.stringify(value, null, 2);
}
