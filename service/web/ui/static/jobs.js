// The view of jobs: by state, found by text, each with what can be done to it.

import { events, get, send } from "./api.js";
import { ago, byId, choices, count, duration, h, json, setText } from "./dom.js";

const PAGE = 50;
const SEARCHED = 1000;
const REFRESH_MS = 3000;
const STATES = {
  "": "All",
  queued: "Queued",
  running: "Running",
  succeeded: "Succeeded",
  failed: "Failed",
  cancelled: "Cancelled",
  expired: "Expired",
};
const ENDED = ["succeeded", "failed", "cancelled", "expired"];
const CAN_RETRY = ["failed", "cancelled", "expired"];

export class JobList {
  constructor() {
    this.rows = byId("job-rows");
    this.note = byId("jobs-note");
    this.more = byId("more-jobs");
    this.dialog = byId("job-dialog");
    this.state = "";
    this.text = "";
    this.cursor = null;
    this.jobs = [];
    this.counts = null;
    this.canRetry = false;
    this.hasModels = false; // whether there are several
    this.run = 0;
    this.press = choices(byId("states"), { ...STATES, undelivered: "Undelivered" }, (state) => this.#filter({ state }));
    byId("search").addEventListener("submit", (event) => {
      event.preventDefault();
      this.#filter({ text: byId("search-text").value.trim() });
    });
    byId("search-text").addEventListener("search", (event) => event.target.value === "" && this.#filter({ text: "" }));
    this.more.addEventListener("click", () => this.#load(this.cursor));
    this.all = byId("all-jobs");
    this.all.addEventListener("click", () => this.#actOnAll());
    this.dialog.addEventListener("close", () => {
      this.watching?.abort();
      if (location.hash.startsWith("#jobs/")) location.hash = "#jobs";
    });
  }

  /** Show the newest jobs of what is chosen, and the one of the address. */
  async open(jobId) {
    this.press(this.state);
    if (this.jobs.length === 0) await this.#load(null);
    if (jobId) await this.#openJob(jobId);
  }

  /** Show the list alone. */
  close() {
    this.dialog.close();
  }

  /** Take how many jobs there are by state; where that has changed and `isShown`, the list is read anew. */
  tell(counts, isShown) {
    if (counts === null) return;
    const text = JSON.stringify(counts);
    if (text === this.counts) return;
    const isFirst = this.counts === null;
    this.counts = text;
    const all = Object.values(counts.statuses).reduce((sum, each) => sum + each, 0);
    for (const button of byId("states").children) {
      const { value } = button.dataset;
      const of = { ...counts.statuses, undelivered: counts.deliveries.undelivered, "": all }[value];
      const label = value === "undelivered" ? "Undelivered" : STATES[value];
      button.replaceChildren(label, " ", h("span", { class: "count" }, count(of)));
    }
    if (performance.now() - this.loadedAt < REFRESH_MS) {
      this.counts = ""; // the next sample compares again
      return;
    }
    const isAtTop = this.jobs.length <= PAGE && !this.rows.contains(document.activeElement);
    if (isShown && !isFirst && isAtTop && this.text === "" && !this.isLoading) this.#load(null);
  }

  #filter(change) {
    Object.assign(this, change);
    this.press(this.state);
    this.all.hidden = !(this.state === "undelivered" || (this.state === "failed" && this.canRetry));
    setText(this.all, this.state === "failed" ? "Run all failed jobs again" : "Send all these results once more");
    this.#load(null);
  }

  async #actOnAll() {
    try {
      const { retried, replayed } = await (
        await send(this.state === "failed" ? "jobs/retry" : "jobs/replay", { method: "POST" })
      ).json();
      await this.#load(null);
      setText(
        this.note,
        retried === undefined ? `${count(replayed)} results are sent once more.` : `${count(retried)} jobs run again.`,
      );
    } catch (error) {
      setText(this.note, error.message);
    }
  }

  async #load(cursor) {
    const run = ++this.run;
    this.isLoading = true;
    this.loadedAt = performance.now();
    try {
      const found = this.text === "" ? await this.#page(cursor, PAGE) : await this.#search(cursor);
      if (run !== this.run) return;
      this.jobs = cursor === null ? found.jobs : [...this.jobs, ...found.jobs];
      this.cursor = found.next_cursor;
      this.#draw(found.note);
    } catch (error) {
      if (run === this.run) this.#fail(error);
    } finally {
      if (run === this.run) this.isLoading = false;
    }
  }

  #page(cursor, limit) {
    const query = new URLSearchParams({ limit });
    if (this.state === "undelivered") query.set("delivery", "undelivered");
    else if (this.state) query.set("status", this.state);
    if (cursor !== null) query.set("cursor", cursor);
    return get(`jobs?${query}`);
  }

  /** A job by its id, or else those of the next thousand that hold the text. */
  async #search(cursor) {
    if (cursor === null && /^[\w.-]{8,}$/.test(this.text)) {
      try {
        return {
          jobs: [await get(`jobs/${encodeURIComponent(this.text)}`)],
          next_cursor: null,
          note: "Found by its id.",
        };
      } catch (error) {
        if (error.status !== 404) throw error;
      }
    }
    const page = await this.#page(cursor, SEARCHED);
    const wanted = this.text.toLowerCase();
    const holds = (job) =>
      JSON.stringify([job.job_id, job.meta, job.error, job.delivery_error, job.result]).toLowerCase().includes(wanted);
    this.searched = (cursor === null ? 0 : this.searched) + page.jobs.length;
    const older = page.next_cursor === null ? "" : " “Older jobs” searches further.";
    return {
      ...page,
      jobs: page.jobs.filter(holds),
      note: `Searched the newest ${count(this.searched)} jobs.${older}`,
    };
  }

  #draw(note = "") {
    this.rows.replaceChildren(...this.jobs.map((job) => row(job, this.hasModels)));
    setText(this.note, this.jobs.length === 0 ? `No such job. ${note}` : note);
    this.more.hidden = this.cursor === null;
  }

  #fail(error) {
    this.jobs = [];
    this.rows.replaceChildren();
    this.more.hidden = true;
    setText(this.note, error.message);
  }

  async #openJob(jobId) {
    this.watching?.abort();
    this.watching = new AbortController();
    const { signal } = this.watching;
    const show = (job, message) => {
      const isFocused = this.dialog.contains(document.activeElement);
      this.dialog.replaceChildren(
        ...jobDetails(job, message, (method, path) => this.#act(jobId, method, path), this.canRetry),
      );
      if (!this.dialog.open) this.dialog.showModal();
      else if (isFocused && !this.dialog.contains(document.activeElement)) this.dialog.querySelector("button").focus();
    };
    this.show = show;
    try {
      show(await get(`jobs/${encodeURIComponent(jobId)}`, signal));
      for await (const { event } of events(`jobs/${encodeURIComponent(jobId)}/events`, signal)) {
        if (event === "status" || event === "result") show(await get(`jobs/${encodeURIComponent(jobId)}`, signal));
      }
    } catch (error) {
      if (error.name !== "AbortError") show({ job_id: jobId }, error.message);
    }
  }

  async #act(jobId, method, path) {
    try {
      await send(`jobs/${encodeURIComponent(jobId)}${path}`, { method });
      await this.#openJob(jobId);
    } catch (error) {
      if (error.name !== "AbortError") this.show(await get(`jobs/${encodeURIComponent(jobId)}`), error.message);
    }
    this.#load(null);
  }
}

const seconds = (from, to) => duration((new Date(to) - new Date(from)) / 1000);

function stateOf(job) {
  return h("span", { class: `state ${job.status}` }, job.status);
}

/** The fields of a result that are the model's own. */
function short({ status, error, meta, ...own }) {
  return JSON.stringify(own);
}

function row(job, hasModels) {
  const link = h("a", { href: `#jobs/${encodeURIComponent(job.job_id)}`, title: job.job_id }, job.job_id);
  const took = job.started_at && job.finished_at ? seconds(job.started_at, job.finished_at) : "–";
  const end = job.error ?? (job.result === null ? "" : short(job.result));
  const cell = (label, ...content) => h("td", { role: "cell", "data-label": label }, content);
  return h(
    "tr",
    { role: "row" },
    h("th", { scope: "row", role: "rowheader" }, link, hasModels && h("span", { class: "model" }, job.model_name)),
    cell("State", stateOf(job)),
    cell("Delivery", job.delivery === "none" ? "–" : job.delivery),
    cell("Accepted", ago(job.created_at)),
    cell("Took", took),
    h(
      "td",
      { role: "cell", "data-label": "Result or error", class: job.error ? "end error" : "end" },
      end.slice(0, 200),
    ),
  );
}

/** What a job is and what became of it, with buttons for what can be done; `act` is called with a method and a path. */
function jobDetails(job, message, act, canRetry) {
  const close = h("button", { type: "button", "data-close": true }, "Close");
  const title = h("h2", { id: "job-title" }, "Job");
  const error = message ? h("p", { class: "notice", role: "alert" }, message) : null;
  const name = h("p", { class: "mono" }, job.job_id);
  if (job.status === undefined) return [h("div", { class: "heading" }, title, close), name, error];
  const times = {
    Accepted: job.created_at,
    Started: job.started_at,
    Ended: job.finished_at,
    "Runs again": job.retry_at,
    Expires: ENDED.includes(job.status) ? null : job.expires_at,
  };
  const facts = {
    Model: job.model_name,
    Lane: job.priority,
    Owner: job.owner,
    Runs: job.attempts ? count(job.attempts) : "",
    "Process died in it": job.crashes ? `${job.crashes} times` : "",
    "Idempotency key": job.idempotency_key,
    Batch: job.batch_id && `${job.batch_id}, line ${job.line}`,
    "Queue of results": job.success_queue,
    "Queue of failures": job.failure_queue,
    Delivery: job.delivery === "none" ? "" : `${job.delivery}, ${count(job.delivery_attempts)} attempts`,
    "Delivery failed by": job.delivery_error,
    ...Object.fromEntries(
      Object.entries(times).map(([label, time]) => [label, time && `${new Date(time).toLocaleString()}, ${ago(time)}`]),
    ),
  };
  const actions = [
    ENDED.includes(job.status)
      ? null
      : h("button", { type: "button", click: () => act("DELETE", "") }, "Cancel the job"),
    canRetry && CAN_RETRY.includes(job.status) && job.delivery !== "pending"
      ? h("button", { type: "button", class: "main", click: () => act("POST", "/retry") }, "Run it again")
      : null,
    job.delivery === "undelivered"
      ? h("button", { type: "button", click: () => act("POST", "/replay") }, "Send the result once more")
      : null,
  ].filter(Boolean);
  const block = (label, value) =>
    value === null || value === undefined
      ? null
      : [h("h3", {}, label), h("pre", { tabindex: "0", "aria-label": label }, json(value))];
  return [
    h("div", { class: "heading" }, title, close),
    name,
    h("p", {}, stateOf(job)),
    error,
    actions.length > 0 && h("div", { class: "actions" }, actions),
    job.error && h("p", { class: "notice" }, job.error),
    h(
      "dl",
      { class: "facts" },
      Object.entries(facts)
        .filter(([, value]) => value)
        .map(([label, value]) => h("div", {}, h("dt", {}, label), h("dd", {}, value))),
    ),
    ...[
      block("Message", job.message),
      block("Result", job.result),
      block("Meta", Object.keys(job.meta).length ? job.meta : null),
    ].flat(),
  ].filter(Boolean);
}
