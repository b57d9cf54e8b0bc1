"use strict";

// The document is asked for here and handed to Swagger UI: where the service wants a key, the page asks for it first and
// keeps it no longer than it is open.
const form = document.getElementById("key-form");
const field = document.getElementById("key");
const problem = document.getElementById("key-error");

async function show(key) {
  const headers = key ? { Authorization: `Bearer ${key}` } : {};
  const answer = await fetch("openapi.json", { headers, credentials: "omit" });
  if (answer.status === 401) {
    form.hidden = false;
    problem.textContent = key ? "This key is not known here." : "";
    field.focus();
    return;
  }
  if (!answer.ok) throw new Error(`openapi.json: status ${answer.status}`);
  form.hidden = true;
  const ui = SwaggerUIBundle({
    spec: await answer.json(),
    domNode: document.getElementById("requests"),
    deepLinking: false,
    validatorUrl: null,
    onComplete: () => key && ui.preauthorizeApiKey("key", key),
  });
}

function failed(error) {
  form.hidden = false;
  problem.textContent = error.message;
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  show(field.value.trim()).catch(failed);
});
show("").catch(failed);
