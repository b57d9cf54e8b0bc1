// What the page asks of the service, and how errors are told.

let key = "";

/** Use an API key from now on; it is kept in this variable and nowhere else. */
export function useKey(text) {
  key = text.trim();
}

/** What the service refused, in its own words. */
export class ServiceError extends Error {
  constructor(status, { field, got, takes }) {
    super(`${field}: got ${got}; takes ${takes}`);
    Object.assign(this, { status, field, got, takes });
  }
}

async function ask(path, options = {}) {
  const headers = { ...options.headers, ...(key ? { Authorization: `Bearer ${key}` } : {}) };
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServiceError(0, { field: "service", got: "no answer", takes: "a connection: is it running?" });
  }
  const text = await response.text();
  let body = null;
  try {
    body = JSON.parse(text);
  } catch {
    // A proxy in front answers in other forms.
  }
  if (response.ok && body !== null) return body;
  const wait = response.headers.get("Retry-After");
  throw new ServiceError(response.status, body?.error ?? {
    field: "service",
    got: `status ${response.status}`,
    takes: wait ? `another try in ${wait} s` : "another try later",
  });
}

function post(path, body, signal) {
  const headers = { "Content-Type": "application/json" };
  return ask(path, { method: "POST", headers, body: JSON.stringify(body), signal });
}

export const model = () => ask("/v1/model");
export const examples = () => ask("/v1/examples");
export const genes = () => ask("/v1/genes");
export const classify = (body, signal) => post("/v1/classify", body, signal);
export const perturb = (body, signal) => post("/v1/perturb", body, signal);
export const screen = (query, signal) => ask(`/v1/screen?${new URLSearchParams(query)}`, { signal });

/** Send a file as it is; `options` are the query parameters of its reading. */
export function classifyFile(file, options, signal) {
  const query = new URLSearchParams(Object.entries(options).filter(([, value]) => value !== ""));
  const headers = { "Content-Type": "application/x-hdf5" }; // what tells it from a JSON request
  return ask(`/v1/classify?${query}`, { method: "POST", headers, body: file, signal });
}
