// Requests to the service. The key is kept for this tab, and sent as a header: never in a URL.

const STORED_KEY = "modalkit-key";
let keyHeader = null;

/** Say by which header keys are sent; null where none is asked for. */
export function sendKeyAs(header) {
  keyHeader = header;
}

export function storedKey() {
  return sessionStorage.getItem(STORED_KEY);
}

export function storeKey(key) {
  if (key) sessionStorage.setItem(STORED_KEY, key);
  else sessionStorage.removeItem(STORED_KEY);
}

/** How the key is written in examples: a header, and its value with `key` in it. */
export function keyExample(key) {
  if (keyHeader === null) return null;
  const isBearer = keyHeader.toLowerCase() === "authorization";
  return [isBearer ? "Authorization" : keyHeader, isBearer ? `Bearer ${key}` : key];
}

/** Thrown for an answer that is an error; `status` is 0 where there was none. */
export class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

/** Send a request, and return the answer. Throws `Refused`. */
export async function send(path, { headers = {}, ...options } = {}) {
  const key = storedKey();
  const example = key === null ? null : keyExample(key);
  let answer;
  try {
    answer = await fetch(path, {
      ...options,
      headers: example === null ? headers : { ...headers, [example[0]]: example[1] },
      credentials: "same-origin",
      cache: "no-store",
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused(0, "The service does not answer.");
  }
  if (answer.ok) return answer;
  const text = await answer.text();
  let problem = null;
  try {
    problem = JSON.parse(text);
  } catch {
    // Not from the service itself, but from a proxy before it.
  }
  const fields = (problem?.errors ?? []).map((error) => `${error.field}: ${error.message}`);
  throw new Refused(answer.status, fields.join("\n") || problem?.detail || `HTTP ${answer.status}`);
}

export async function get(path, signal) {
  return (await send(path, { signal })).json();
}

/** The server-sent events of a route, as `{event, data}`, until it ends. Throws `Refused`. */
export async function* events(path, signal) {
  const answer = await send(path, { signal, headers: { Accept: "text/event-stream" } });
  if (answer.status === 204) return;
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    buffer += value;
    const parts = buffer.split(/\r?\n\r?\n/);
    buffer = parts.pop();
    for (const part of parts) {
      const fields = Object.fromEntries(
        part.split(/\r?\n/).map((line) => {
          const colon = line.indexOf(":");
          return [line.slice(0, colon), line.slice(colon + 1).trimStart()];
        }),
      );
      if (fields.data !== undefined) yield { event: fields.event, data: JSON.parse(fields.data) };
    }
  }
}
