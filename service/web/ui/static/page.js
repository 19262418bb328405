// The page: its views, its key, and the stream of samples that all views are drawn from.

import { Refused, events, get, sendKeyAs, storeKey, storedKey } from "./api.js";
import { byId, h, setText } from "./dom.js";
import { History } from "./history.js";
import { JobList } from "./jobs.js";
import { Live } from "./live.js";
import { Models } from "./models.js";
import { Playground } from "./playground.js";

const VIEWS = ["live", "jobs", "try", "models"];
const TITLES = { live: "Live", jobs: "Jobs", try: "Playground", models: "Models" };
const THEMES = { "light dark": "Auto", light: "Light", dark: "Dark" };
const RETRY_MS = 2000;

const views = { live: new Live(), jobs: new JobList(), try: new Playground(), models: new Models() };
const histories = new Map();
let service = { models: [] };
let view = "live";
let last = null;
let stream = null;
let isPaused = false;

// Views.

function chosenModel() {
  return byId("model").value || service.models[0]?.name;
}

function historyOf(name) {
  if (!histories.has(name)) histories.set(name, new History());
  return histories.get(name);
}

function draw() {
  if (last === null) return;
  const name = chosenModel();
  if (view === "live") views.live.draw(name, historyOf(name), views.try.traces, last.jobs);
  if (view === "try") views.try.tell(historyOf(name));
  if (view === "models") views.models.draw(last.models);
  views.jobs.tell(last.jobs, view === "jobs");
}

function decoded(text) {
  try {
    return decodeURIComponent(text);
  } catch {
    return text; // an address that was cut
  }
}

function route() {
  const [wanted, rest] = location.hash.slice(1).split(/\/(.*)/);
  view = VIEWS.includes(wanted) ? wanted : "live";
  for (const each of VIEWS) byId(`view-${each}`).hidden = each !== view;
  for (const link of document.querySelectorAll("nav a")) {
    if (link.getAttribute("href") === `#${view}`) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  if (!rest) views.jobs.close();
  document.title = `${TITLES[view]} · modalkit`;
  if (view === "jobs" && service.models.length > 0) views.jobs.open(rest ? decoded(rest) : null);
  draw();
}

function showModels() {
  const names = service.models.map((model) => model.name);
  const chosen = byId("model").value;
  byId("model").replaceChildren(...names.map((name) => h("option", { value: name, selected: name === chosen }, name)));
  byId("model-choice").hidden = names.length < 2;
  chooseModel();
}

function chooseModel() {
  if (service.models.length > 0) views.try.choose(service.models, chosenModel());
  draw();
}

// The stream of samples.

function tell(state, text) {
  byId("connection").className = state;
  setText(byId("connection"), text);
}

function notice(text) {
  byId("notice").hidden = text === null;
  setText(byId("notice"), text ?? "");
}

function take(sample) {
  last = sample;
  for (const [name, model] of Object.entries(sample.models)) historyOf(name).add(sample.at, model);
  const models = Object.entries(sample.models);
  const [name, other] = models.find(([, model]) => model.readiness !== "ready") ?? [];
  const whose = models.length > 1 ? `${name} ` : "";
  tell(other ? "warning" : "good", other ? `Live · ${whose}${other.readiness}` : "Live");
  draw();
}

const pause = (ms) => new Promise((resolve) => setTimeout(resolve, ms));

/** Follow the service until the page is paused or hidden. */
async function follow() {
  if (stream !== null || isPaused || document.hidden) return;
  const own = (stream = new AbortController());
  while (!own.signal.aborted) {
    try {
      await readService(); // again after a cut: it may be another process, with other models
      for await (const { event, data } of events("ui/events", own.signal)) {
        if (event === "sample") {
          notice(null);
          take(data);
        }
      }
      tell("warning", "Reconnecting");
    } catch (error) {
      if (own.signal.aborted) return;
      if (error.status === 401) {
        stop();
        tell("warning", "Key needed");
        askForKey(storedKey() === null ? "This service asks for a key." : error.message);
        return;
      }
      if (error.status === 403) {
        stop();
        views.try.canTell = false;
        tell("warning", "Not shown");
        notice(`What happens now is not shown: ${error.message}. Jobs and the playground work as far as the key goes.`);
        return;
      }
      if (!(error instanceof Refused || error instanceof TypeError)) throw error;
      tell("bad", "Not connected");
      if (error.status) notice(error.message);
    }
    await pause(RETRY_MS);
  }
}

function stop() {
  stream?.abort();
  stream = null;
}

async function readService() {
  const told = await get("ui/service");
  if (JSON.stringify(told) === JSON.stringify(service)) return;
  service = told;
  sendKeyAs(service.key_header);
  byId("key").hidden = service.key_header === null;
  views.jobs.canRetry = service.can_retry;
  views.jobs.hasModels = service.models.length > 1;
  showModels();
  route();
}

// The key, the theme, and whether the page goes on.

function askForKey(reason) {
  setText(byId("key-reason"), reason);
  byId("key-text").value = "";
  byId("key-forget").hidden = storedKey() === null;
  if (!byId("key-dialog").open) byId("key-dialog").showModal();
}

function useKey(key) {
  storeKey(key);
  byId("key-dialog").close();
  views.try.canTell = true;
  notice(null);
  stop();
  follow();
  route();
}

function showTheme() {
  const theme = localStorage.getItem("modalkit-theme") ?? "light dark";
  document.documentElement.style.colorScheme = theme;
  byId("theme").replaceChildren(h("span", { class: "unseen" }, "Theme: "), THEMES[theme] ?? "Auto");
}

byId("theme").addEventListener("click", () => {
  const names = Object.keys(THEMES);
  const now = localStorage.getItem("modalkit-theme") ?? names[0];
  localStorage.setItem("modalkit-theme", names[(names.indexOf(now) + 1) % names.length]);
  showTheme();
});
byId("pause").addEventListener("click", () => {
  isPaused = !isPaused;
  byId("pause").setAttribute("aria-pressed", String(isPaused));
  if (isPaused) {
    stop();
    tell("warning", "Paused");
  } else follow();
});
byId("key").addEventListener("click", () => askForKey("The key of this tab."));
byId("key-forget").addEventListener("click", () => useKey(null));
byId("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  const key = byId("key-text").value.trim();
  if (/^[\x20-\xff]+$/.test(key)) useKey(key);
  else setText(byId("key-reason"), "No header can carry this key: use letters, digits and signs of Latin-1.");
});
byId("model").addEventListener("change", chooseModel);
document.addEventListener("click", (event) => {
  const button = event.target.closest?.("[data-close]");
  button?.closest("dialog").close();
});
document.addEventListener("visibilitychange", () => {
  if (document.hidden) stop();
  else follow();
});
window.addEventListener("hashchange", route);

showTheme();
route();
follow();
