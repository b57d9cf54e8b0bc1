// The page: what is served, and its three sections.

import { examples, model, useKey } from "./service.js";
import { el, plural, showError } from "./elements.js";
import { perturbationSection } from "./perturbation.js";
import { rankingSection } from "./ranking.js";
import { ofEachTask } from "./tasks.js";
import { typesSection } from "./types.js";

const place = (id) => document.getElementById(id);
// What several sections need to know: the model served, and its example cells.
const session = { model: null, examples: [], answered };

const perturbCell = perturbationSection(session);
const loadRanking = rankingSection(session);
typesSection(session, perturbCell);

async function start() {
  showError(place("model-error"), null);
  try {
    session.model = await model();
    showModel(session.model);
    session.examples = (await examples()).cells;
    showExamples(session.examples);
  } catch (error) {
    place("model").replaceChildren(el("p", {}, error.status === 401 ? "This service asks for an API key." : ""));
    showError(place("model-error"), error);
    if (error.status === 401) {
      place("key-box").open = true;
      place("key").focus();
    }
    return;
  }
  await loadRanking();
}

function showModel(found) {
  const facts = [
    ["Model", found.name],
    ["Version", found.version ?? "not registered"],
    ["Digest", found.digest],
    ["Pooling", found.pooling.replaceAll("_", " ")],
    ...ofEachTask(found).map(([task, { labels }]) => [task ? `Task ${task}` : "Types", `${labels.length}: ${labels.join(", ")}`]),
    ["Longest cell", plural(found.max_length, "token")],
  ];
  place("model").replaceChildren(
    el("dl", { class: "facts" }, facts.map(([name, fact]) =>
      el("div", {}, el("dt", {}, name), el("dd", {}, String(fact))))),
  );
  place("file-note").textContent = found.encodes_counts
    ? `Drop an h5ad file with raw counts here, or choose one: up to ${plural(found.limits.max_upload_cells, "cell")}, ${
      Math.floor(found.limits.max_upload_bytes / 2 ** 20)} MiB.`
    : "This model takes no counts: its vocabulary has no medians.";
  place("file").disabled = !found.encodes_counts;
  place("gene-note").textContent = `Symbol or Ensembl id, up to ${
    found.limits.max_candidate_genes}; several at once with spaces or commas between.`;
  place("goal").replaceChildren(
    el("option", { value: "" }, "how far the other genes move"),
    ...found.states.map((state) => el("option", { value: state }, `shift to ${state}`)),
  );
}

function showExamples(cells) {
  place("example").replaceChildren(
    ...cells.map((cell, at) => el("option", { value: at }, `${cell.label}: ${cell.cell_id}`)),
    ...(cells.length ? [] : [el("option", {}, "none lie with this model")]),
  );
  place("example").disabled = place("example-go").disabled = cells.length === 0;
}

/** Notice that another version answers than the one shown: models are replaced while a service runs. */
function answered({ version, digest }) {
  if (session.model.digest !== digest || session.model.version !== version) start();
}

place("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  useKey(place("key").value);
  start();
});
start();
