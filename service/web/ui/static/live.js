// The view of what happens now.

import { Batches, took } from "./batches.js";
import { Bars, Scatter, TimeChart } from "./charts.js";
import { byId, count, duration, h, number, percent, setText } from "./dom.js";

const PADDING_LIMITS = [0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 1];
const SIZE_LIMITS = [1, 2, 4, 8, 16, 32, 64, 128, 256, Infinity];
const LANES = ["interactive", "bulk"];

const FIGURES = {
  rate: "Items a second",
  waiting: "Waiting",
  work: "Predicted to take",
  running: "Running",
  size: "Items in a batch",
  padding: "Padding",
  off: "Prediction off by",
  busy: "Model busy",
};

export class Live {
  constructor() {
    this.figures = Object.fromEntries(Object.keys(FIGURES).map((name) => [name, h("dd", {}, "–")]));
    byId("figures").replaceChildren(
      ...Object.entries(FIGURES).map(([name, label]) => h("div", {}, h("dt", {}, label), this.figures[name])),
    );
    this.rates = new TimeChart(byId("rate-chart"), ["succeeded", "failed"], "Items each second");
    this.queue = new TimeChart(byId("queue-chart"), LANES, "Items that wait");
    this.batches = new Batches();
    this.cells = Object.fromEntries(
      LANES.map((lane) => [lane, ["items", "work", "oldest"].map(() => h("td", { class: "number" }, "–"))]),
    );
    byId("queue").replaceChildren(
      ...LANES.map((lane) => h("tr", {}, h("th", { scope: "row", class: lane }, lane), this.cells[lane])),
    );
    this.padding = new Bars(
      byId("padding"),
      ["<1", "<2", "<5", "<10", "<20", "<30", "<50", "≥50"],
      "Batches by their share of padding in per cent",
    );
    this.sizes = null;
    this.samples = 0; // the distributions change slowly, and are drawn for every second one
    this.drawn = "";
    this.predicted = new Scatter(byId("predicted"));
  }

  /** Show what is known of a model. `mine` are the traces of the playground, `jobs` the counts of all jobs. */
  draw(model, history, mine, jobs) {
    const sample = history.last;
    if (sample?.batches === undefined) return;
    const recent = history.recent();
    this.batches.draw(model, recent, sample.at, mine); // first, because it reads a width: nothing is to be laid out yet
    this.#drawFigures(history, sample, recent);
    for (const lane of LANES) {
      const [items, work, oldest] = this.cells[lane];
      setText(items, count(sample.queued[lane]));
      setText(work, duration(sample.work_s[lane]));
      setText(oldest, sample.queued[lane] ? duration(sample.oldest_s[lane]) : "–");
    }
    const stored = jobs?.statuses.queued ?? 0;
    setText(
      byId("backlog"),
      stored === 0
        ? "No job waits in the store."
        : `${count(stored)} job${stored === 1 ? " waits" : "s wait"} in the store.`,
    );
    this.rates.draw(history.points, sample.at);
    this.queue.draw(history.points, sample.at);
    const what = `${model} ${sample.limits?.max_batch_size}`;
    if (what !== this.drawn || (this.samples += 1) % 2 === 0)
      this.#drawDistributions(recent, sample.limits?.max_batch_size ?? 32);
    this.drawn = what;
  }

  #drawFigures(history, sample, recent) {
    const rate = history.rate("succeeded");
    const busy = history.rate("busy");
    const waiting = sample.queued.interactive + sample.queued.bulk;
    const [real, padded] = ["real_tokens", "padded_tokens"].map((name) =>
      recent.reduce((sum, batch) => sum + batch[name], 0),
    );
    const requests = recent.reduce((sum, batch) => sum + batch.count, 0);
    const off = median(measured(recent).map(([predicted, actual]) => Math.abs(predicted / actual - 1)));
    const texts = {
      rate: rate === null ? "–" : number(rate),
      waiting: count(waiting),
      work: duration(sample.work_s.interactive + sample.work_s.bulk),
      running: count(sample.running),
      size: recent.length === 0 ? "–" : number(requests / recent.length),
      padding: padded === 0 ? "–" : percent(1 - real / padded),
      off: off === null ? "–" : percent(off),
      busy: busy === null ? "–" : percent(Math.min(1, busy)),
    };
    for (const [name, text] of Object.entries(texts)) setText(this.figures[name], text);
  }

  #drawDistributions(recent, largest) {
    const limits = SIZE_LIMITS.slice(0, SIZE_LIMITS.findIndex((limit) => limit >= largest) + 1);
    if (this.sizes?.labels.length !== limits.length) {
      const labels = limits.map((limit, place) => (place < 2 ? `${limit}` : `≤${limit === Infinity ? "…" : limit}`));
      this.sizes = new Bars(byId("sizes"), labels, "Batches by their number of requests");
    }
    this.sizes.draw(
      histogram(
        recent.map((batch) => batch.count),
        limits,
      ),
    );
    this.padding.draw(
      histogram(
        recent.map((batch) => 1 - batch.real_tokens / batch.padded_tokens),
        PADDING_LIMITS,
        1e-9,
      ),
    );
    const pairs = measured(recent);
    this.predicted.draw(pairs, duration);
    const close = pairs.filter(([predicted, actual]) => Math.abs(predicted / actual - 1) <= 0.2).length;
    const last = `the last ${count(recent.length)} batches`;
    setText(byId("sizes-caption"), recent.length ? `Requests in each of ${last}` : "No batch has run yet");
    setText(byId("padding-caption"), recent.length ? `Per cent of padding in ${last}` : "No batch has run yet");
    const share = pairs.length
      ? `${percent(close / pairs.length)} of ${count(pairs.length)} within a fifth of the prediction`
      : "No batch has run yet";
    setText(byId("predicted-caption"), share);
  }
}

/** What was predicted and what it took, of the batches that succeeded in one run. */
function measured(batches) {
  return batches
    .filter((batch) => batch.measured_s > 0 && batch.predicted_s > 0)
    .map((batch) => [batch.predicted_s, took(batch)]);
}

/** How many values are up to each limit, and above the one before. */
function histogram(values, limits, slack = 0) {
  const counts = limits.map(() => 0);
  for (const value of values)
    counts[
      Math.max(
        0,
        limits.findIndex((limit) => value <= limit - slack || limit === limits.at(-1)),
      )
    ] += 1;
  return counts;
}

function median(values) {
  if (values.length === 0) return null;
  return values.sort((a, b) => a - b)[Math.floor(values.length / 2)];
}
