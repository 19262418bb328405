// The playground: a request to a model, as code, its answer, and the batches that it ran in.

import { keyExample, send } from "./api.js";
import { batchDetails } from "./batches.js";
import { byId, choices, count, duration, h, json } from "./dom.js";
import { ItemForm } from "./form.js";

const TRACES = "6d6f64616c6b6974"; // how the ids of its traces begin: the service tells the batches of these
const MOST_COPIES = 1000;

const hex = (bytes) =>
  Array.from(crypto.getRandomValues(new Uint8Array(bytes)), (byte) => byte.toString(16).padStart(2, "0")).join("");

export class Playground {
  constructor() {
    this.traces = new Set();
    this.models = [];
    this.language = "curl";
    this.canTell = true;
    this.shownBatches = "";
    const press = choices(byId("languages"), { curl: "curl", python: "Python" }, (language) => {
      this.language = language;
      press(language);
      this.#showCode();
    });
    press(this.language);
    byId("copy").hidden = navigator.clipboard === undefined; // which is only there by HTTPS and on this machine
    byId("copy").addEventListener("click", async () => {
      await navigator.clipboard.writeText(byId("code").textContent);
      byId("copy").textContent = "Copied";
      setTimeout(() => (byId("copy").textContent = "Copy"), 1500);
    });
    byId("request").addEventListener("submit", (event) => {
      event.preventDefault();
      if (this.sending) this.sending.abort();
      else this.#send();
    });
    byId("request").addEventListener("change", () => this.#showCode());
  }

  /** Show the form of a model, of all that there are. */
  choose(models, name) {
    const model = models.find((each) => each.name === name);
    if (model === this.model) return;
    [this.models, this.model] = [models, model];
    this.form = new ItemForm(model.schema, () => this.#showCode());
    this.options = {
      mode: h(
        "select",
        { id: "mode" },
        h("option", { value: "wait" }, "Wait for the result"),
        h("option", { value: "job" }, "As a job"),
      ),
      priority: h(
        "select",
        { id: "priority" },
        h("option", { value: "" }, "as usual"),
        h("option", {}, "interactive"),
        h("option", {}, "bulk"),
      ),
      copies: h("input", { id: "copies", type: "number", min: 1, max: MOST_COPIES, value: 1 }),
      queue: h("input", { id: "queue-name", type: "text", placeholder: "none" }),
    };
    const field = (label, control, hint) =>
      h(
        "div",
        { class: "field" },
        h("label", { for: control.id }, label),
        control,
        hint && h("p", { class: "caption" }, hint),
      );
    const queue = field("Queue of the result", this.options.queue);
    const toggleQueue = () => (queue.hidden = this.options.mode.value !== "job");
    this.options.mode.addEventListener("change", toggleQueue);
    toggleQueue();
    this.submit = h("button", { type: "submit", class: "main" }, "Send");
    this.problem = h("p", { class: "notice", role: "alert", hidden: true });
    const asJson = h("button", { type: "button", click: () => this.#toggleJson(asJson) }, "Edit as JSON");
    byId("request").replaceChildren(
      h("div", { class: "heading" }, h("h3", {}, `An item for ${model.name}`), this.form.isSplit && asJson),
      this.form.root,
      h(
        "div",
        { class: "row" },
        field("How", this.options.mode),
        field("Lane", this.options.priority),
        field("Copies", this.options.copies),
        queue,
      ),
      h("p", { class: "caption" }, "Several copies go as one list, and show how batches form."),
      this.problem,
      h("div", { class: "actions" }, this.submit),
    );
    this.#showCode();
  }

  #toggleJson(button) {
    try {
      this.form.showFields(!this.form.isSplit, this.form.item());
      button.textContent = this.form.isSplit ? "Edit as JSON" : "Edit as fields";
      this.#showCode();
    } catch (error) {
      this.#showProblem(error.message);
    }
  }

  /** The request as it is filled in. Throws `SyntaxError`. */
  #request() {
    const { mode, priority, copies, queue } = this.options;
    const item = this.form.item();
    const one =
      mode.value === "job"
        ? { message: item, ...(queue.value ? { success_queue: queue.value, failure_queue: queue.value } : {}) }
        : item;
    const times = Math.max(1, Math.min(MOST_COPIES, Math.floor(Number(copies.value)) || 1));
    const route = mode.value === "job" ? "async/predict" : times > 1 ? "batch/predict" : "sync/predict";
    const query = this.models.length > 1 ? `?${new URLSearchParams({ model_name: this.model.name })}` : "";
    return { path: route + query, headers: priority.value ? { "X-Priority": priority.value } : {}, one, times };
  }

  #showProblem(message) {
    this.problem.hidden = message === null;
    this.problem.textContent = message ?? "";
  }

  #showCode() {
    try {
      const request = this.#request();
      const url = new URL(request.path, document.baseURI).href;
      const key = keyExample("<your key>");
      const headers = { ...(key === null ? {} : { [key[0]]: key[1] }), ...request.headers };
      byId("code").textContent = this.language === "curl" ? curl(url, headers, request) : python(url, headers, request);
      this.#showProblem(null);
    } catch (error) {
      this.#showProblem(error.message);
    }
  }

  async #send() {
    let request;
    try {
      request = this.#request();
    } catch (error) {
      this.#showProblem(error.message);
      return;
    }
    const trace = TRACES + hex(8);
    this.traces.add(trace);
    this.trace = trace;
    this.shownBatches = "";
    byId("rode").replaceChildren();
    byId("answer").replaceChildren(h("p", { class: "caption" }, "Waiting …"));
    this.sending = new AbortController();
    this.submit.textContent = "Stop waiting";
    const started = performance.now();
    try {
      const answer = await send(request.path, {
        method: "POST",
        headers: { ...request.headers, traceparent: `00-${trace}-${hex(8)}-01` },
        body: JSON.stringify(request.times > 1 ? Array(request.times).fill(request.one) : request.one),
        signal: this.sending.signal,
      });
      const content = await answer.json();
      const seconds = (performance.now() - started) / 1000;
      byId("answer").replaceChildren(...answerOf(answer.status, seconds, content));
      byId("rode").replaceChildren(
        h(
          "p",
          { class: "caption" },
          this.canTell ? "Its batch is told in a second …" : "This key does not show which batch it ran in.",
        ),
      );
    } catch (error) {
      const text =
        error.name === "AbortError" ? "The request was cancelled; its items have left the queue." : error.message;
      byId("answer").replaceChildren(
        h("p", { class: "notice" }, error.status ? `HTTP ${error.status}: ${text}` : text),
      );
    } finally {
      this.sending = null;
      this.submit.textContent = "Send";
    }
  }

  /** Show which batches the last request ran in, as far as they are known. */
  tell(history) {
    if (!this.trace) return;
    const batches = history.recent().filter((batch) => batch.traces.includes(this.trace));
    const text = batches.map((batch) => batch.number).join(", ");
    if (text === this.shownBatches) return;
    this.shownBatches = text;
    const where =
      batches.length === 1 ? "It ran in one batch." : `It ran in ${count(batches.length)} batches: ${text}.`;
    byId("rode").replaceChildren(
      h("h3", {}, "The requests of its batch"),
      h("p", { class: "caption" }, where),
      batchDetails(batches[0], false),
    );
  }
}

function answerOf(status, seconds, content) {
  const ids = (Array.isArray(content) ? content : [content])
    .map((each) => each?.job_id)
    .filter((id) => typeof id === "string");
  const links = ids.slice(0, 20).map((id) => h("li", {}, h("a", { href: `#jobs/${encodeURIComponent(id)}` }, id)));
  return [
    h("p", {}, h("span", { class: "state succeeded" }, `HTTP ${status}`), ` in ${duration(seconds)}`),
    ids.length > 0 && h("ul", { class: "plain", "aria-label": "Jobs" }, links),
    h("pre", { tabindex: "0", "aria-label": "The answer" }, json(content)),
  ].filter(Boolean);
}

const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;

function curl(url, headers, { one, times }) {
  const body = JSON.stringify(times > 1 ? Array(times).fill(one) : one);
  const parts = Object.entries(headers).map(([name, value]) => `  -H ${quoted(`${name}: ${value}`)}`);
  return [`curl ${quoted(url)}`, ...parts, `  -d ${quoted(body)}`].join(" \\\n");
}

/** A JSON value as Python writes it. */
function literal(value) {
  if (value === null || value === undefined) return "None";
  if (typeof value === "boolean") return value ? "True" : "False";
  if (Array.isArray(value)) return `[${value.map(literal).join(", ")}]`;
  if (typeof value === "object")
    return `{${Object.entries(value)
      .map(([key, each]) => `${JSON.stringify(key)}: ${literal(each)}`)
      .join(", ")}}`;
  return JSON.stringify(value);
}

function python(url, headers, { one, times }) {
  const lines = ["import httpx", "", "answer = httpx.post(", `    ${JSON.stringify(url)},`];
  if (Object.keys(headers).length > 0) lines.push(`    headers=${literal(headers)},`);
  lines.push(
    `    json=${times > 1 ? `[${literal(one)}] * ${times}` : literal(one)},`,
    "    timeout=60,",
    ")",
    "answer.raise_for_status()",
    "print(answer.json())",
  );
  return lines.join("\n");
}
