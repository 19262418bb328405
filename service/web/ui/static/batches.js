// The last batches: a column each, when each ran, and the requests of the chosen one.

import { byId, count, duration, h, number, percent, setText, svg } from "./dom.js";
import { KEPT_BATCHES } from "./history.js";

const COLUMN_PX = 34;
const MOST_COLUMNS = 32;
const BOX_HEIGHT = 96;
const MOST_ROW = 8;
const TIMELINE_S = 10;
const MOST_RIDERS = 128;

const REASONS = {
  full: "it held as many requests as max_batch_size allows",
  budget: "one more request would have exceeded a limit of tokens, time or memory",
  age: "its oldest request had waited long enough",
  deadline: "a request in it would have missed its deadline",
  idle: "a worker was free, and neither more companions nor waiting would have paid",
};

const paddingOf = (batch) => 1 - batch.real_tokens / batch.padded_tokens;

export const took = (batch) => batch.measured_s || batch.total_s;

/** The requests of a batch as `[lane, size, waited]`; for one that was told in short, of equal sizes. */
function requestsOf(batch) {
  if (batch.requests) return batch.requests;
  const size = batch.real_tokens / batch.count;
  return Array.from({ length: batch.count }, (_, place) => [
    place < batch.count - batch.bulk ? "interactive" : "bulk",
    size,
    null,
  ]);
}

function summary(batch) {
  const requests = `${count(batch.count)} request${batch.count === 1 ? "" : "s"}`;
  const failed = batch.failed ? `, ${batch.failed} failed` : "";
  return `Batch ${count(batch.number)}: ${requests}${failed}, ${duration(took(batch))}, ${percent(paddingOf(batch))} padding`;
}

/** The box of a batch: a row for each request, as long as its share of the longest one. */
function boxOf(batch, rowHeight) {
  const requests = requestsOf(batch);
  const longest = batch.padded_tokens / batch.count;
  const gap = rowHeight > 2 ? 1 : 0;
  const top = BOX_HEIGHT - requests.length * rowHeight;
  const rows = { interactive: "", bulk: "" };
  requests.forEach(([lane, size], place) => {
    const width = Math.max(2, (100 * size) / longest).toFixed(1);
    rows[lane] += `M0 ${(top + place * rowHeight).toFixed(2)}h${width}v${(rowHeight - gap).toFixed(2)}H0z`;
  });
  return svg(
    "svg",
    { viewBox: `0 0 100 ${BOX_HEIGHT}`, preserveAspectRatio: "none", "aria-hidden": "true" },
    svg("path", { class: "padding", d: `M0 ${top}H100V${BOX_HEIGHT}H0z` }),
    svg("path", { class: "interactive", d: rows.interactive }),
    svg("path", { class: "bulk", d: rows.bulk }),
  );
}

export class Batches {
  constructor() {
    this.root = byId("batches");
    this.timeline = byId("timeline");
    this.detail = byId("batch");
    this.columns = new Map();
    this.chosen = null;
    this.rowHeight = 0;
    this.model = null;
    this.isHeld = false;
    const hold = (isHeld) => () => (this.isHeld = isHeld);
    this.root.addEventListener("pointerenter", hold(true));
    this.root.addEventListener("pointerleave", hold(false));
    this.root.addEventListener("focusin", hold(true));
    this.root.addEventListener("focusout", hold(false));
    this.root.addEventListener("keydown", (event) => this.#move(event));
    this.lanes = ["interactive", "bulk"].map((lane) => svg("path", { class: lane }));
    this.drawing = svg("svg", { viewBox: "0 0 1000 40", preserveAspectRatio: "none", role: "img" }, this.lanes);
    this.start = h("span", { class: "start" });
    this.timeline.append(
      this.drawing,
      this.start,
      h("span", { class: "middle" }, "When each ran, side by side where several ran at once"),
      h("span", { class: "end" }, "now"),
    );
  }

  /** Show the last of these batches, the newest last; `mine` are the traces of the playground. */
  draw(model, batches, now, mine) {
    if (this.model !== model) {
      this.model = model;
      this.chosen = null;
      this.isHeld = false;
      this.#showChosen(null);
    }
    this.#drawTimeline(batches, now);
    if (this.isHeld && this.columns.size > 0) return;
    const room = Math.max(4, Math.min(MOST_COLUMNS, Math.floor(this.root.clientWidth / COLUMN_PX)));
    const shown = batches.slice(-room);
    const most = Math.max(1, ...shown.map((batch) => batch.count));
    const rowHeight = Math.min(MOST_ROW, BOX_HEIGHT / most);
    const kept = rowHeight === this.rowHeight ? this.columns : new Map();
    this.rowHeight = rowHeight;
    const columns = new Map(shown.map((batch) => [batch.number, kept.get(batch.number) ?? this.#column(batch, mine)]));
    const isSame =
      columns.size === this.columns.size && [...columns].every(([key, value]) => this.columns.get(key) === value);
    this.columns = columns;
    if (isSame) return;
    this.root.replaceChildren(...columns.values());
    this.#setTabStop();
  }

  #column(batch, mine) {
    const isMine = batch.traces.some((trace) => mine.has(trace));
    return h(
      "button",
      {
        type: "button",
        role: "option",
        class: `batch${batch.failed ? " failed" : ""}${isMine ? " mine" : ""}`,
        tabindex: "-1",
        "aria-selected": String(this.chosen === batch.number),
        "aria-label": summary(batch) + (isMine ? ", with your request" : ""),
        click: () => this.#choose(batch, isMine),
      },
      boxOf(batch, this.rowHeight),
      h("span", { class: "took" }, number(took(batch) * 1000)),
    );
  }

  #choose(batch, isMine) {
    this.chosen = this.chosen === batch.number ? null : batch.number;
    this.columns.forEach((column, key) => column.setAttribute("aria-selected", String(key === this.chosen)));
    this.#setTabStop();
    this.#showChosen(this.chosen === null ? null : batch, isMine);
  }

  #setTabStop() {
    const last = [...this.columns.keys()].pop();
    const stop = this.columns.has(this.chosen) ? this.chosen : last;
    this.columns.forEach((column, key) => column.setAttribute("tabindex", key === stop ? "0" : "-1"));
  }

  #move(event) {
    const steps = { ArrowLeft: -1, ArrowRight: 1, Home: -Infinity, End: Infinity };
    if (!(event.key in steps)) return;
    event.preventDefault();
    const columns = [...this.columns.values()];
    const place = columns.indexOf(document.activeElement) + steps[event.key];
    columns[Math.max(0, Math.min(columns.length - 1, place))]?.focus();
  }

  #showChosen(batch, isMine) {
    this.detail.hidden = batch === null;
    this.detail.replaceChildren(...(batch === null ? [] : [batchDetails(batch, isMine)]));
  }

  #drawTimeline(batches, now) {
    // Where more run than are kept, these reach back less far.
    const span = batches.length < KEPT_BATCHES ? TIMELINE_S : Math.min(TIMELINE_S, now - batches[0].at);
    setText(this.start, `${number(span)} s ago`);
    const rows = []; // when the batch at the end of each row ended
    const paths = { interactive: [], bulk: [] };
    for (const batch of batches.toSorted((a, b) => a.at - b.at)) {
      const end = batch.at + batch.total_s;
      if (end < now - span) continue;
      let row = rows.findIndex((ended) => ended <= batch.at + 1e-4);
      if (row < 0) row = rows.push(0) - 1;
      rows[row] = end;
      const x = Math.max(0, (1000 * (batch.at - now + span)) / span);
      const width = Math.max(1.5, (1000 * (end - now + span)) / span - x - 0.7);
      paths[batch.priority].push([x, row, width]);
    }
    const height = 40 / Math.max(1, Math.min(8, rows.length));
    ["interactive", "bulk"].forEach((lane, place) => {
      const d = paths[lane].map(
        ([x, row, width]) =>
          `M${x.toFixed(1)} ${(row * height + 1).toFixed(1)}h${width.toFixed(1)}v${(height - 2).toFixed(1)}h-${width.toFixed(1)}z`,
      );
      this.lanes[place].setAttribute("d", d.join(""));
    });
    const shown = paths.interactive.length + paths.bulk.length;
    this.drawing.setAttribute(
      "aria-label",
      `${shown} batches in the last ${number(span)} seconds, ${rows.length} at once at most`,
    );
  }
}

/** What a batch was, and its requests in a table. */
export function batchDetails(batch, isMine) {
  const lanes =
    batch.bulk === 0 || batch.bulk === batch.count
      ? batch.priority
      : `${batch.count - batch.bulk} interactive, ${batch.bulk} bulk`;
  const facts = {
    Requests: `${count(batch.count)} (${lanes})`,
    Tokens: `${count(batch.real_tokens)} of ${count(batch.padded_tokens)}, ${percent(paddingOf(batch))} padding`,
    Took: duration(took(batch)),
    Predicted: duration(batch.predicted_s),
  };
  if (batch.failed) facts.Failed = count(batch.failed);
  if (batch.requeued) facts["Queued again"] = count(batch.requeued);
  if (batch.device) facts.Device = String(batch.device);
  const requests = requestsOf(batch);
  const longest = batch.padded_tokens / batch.count;
  return h(
    "div",
    { class: "batch-details" },
    h(
      "div",
      {},
      h("h4", {}, `Batch ${count(batch.number)}`, isMine && h("span", { class: "tag" }, "with your request")),
      h(
        "dl",
        { class: "facts" },
        Object.entries(facts).map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value))),
      ),
      h("p", { class: "caption" }, `It ran as it was because ${REASONS[batch.reason] ?? batch.reason}.`),
    ),
    h(
      "div",
      { class: "riders", tabindex: "0", role: "group", "aria-label": "Requests of the batch" },
      h(
        "table",
        {},
        h(
          "thead",
          {},
          h(
            "tr",
            {},
            ["Lane", "Size", "", "Waited"].map((name) => (name ? h("th", { scope: "col" }, name) : h("td"))),
          ),
        ),
        h(
          "tbody",
          {},
          requests.slice(0, MOST_RIDERS).map(([lane, size, waited]) => rider(lane, size, waited, longest)),
        ),
      ),
      requests.length > MOST_RIDERS && h("p", { class: "caption" }, `and ${requests.length - MOST_RIDERS} more`),
    ),
  );
}

function rider(lane, size, waited, longest) {
  const bar = h("i", { class: `length ${lane}` });
  bar.style.width = `${Math.max(1, Math.round((100 * size) / longest))}%`;
  return h(
    "tr",
    {},
    h("td", {}, lane),
    h("td", { class: "number" }, number(size)),
    h("td", { class: "of" }, bar),
    h("td", { class: "number" }, waited === null ? "" : duration(waited)),
  );
}
