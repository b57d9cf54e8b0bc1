// Cell types: of a file, or of an example cell.

import { classify, classifyFile, ServiceError } from "./service.js";
import { answeredBy, el, number, pager, percent, plural, shareBar, showError, table } from "./elements.js";
import { classOf, mostLabels, ofEachTask, saidOf } from "./tasks.js";

const CELLS_A_PAGE = 25;
const place = (id) => document.getElementById(id);

/** Set the section up. `choose` is told of the cell that is to be perturbed, null when there is none. */
export function typesSection(session, choose) {
  let running = null;

  async function run(what, work) {
    running?.abort();
    const mine = (running = new AbortController());
    place("types-status").textContent = `Classifying ${what} …`;
    place("types-result").replaceChildren();
    showError(place("types-error"), null);
    choose(null);
    try {
      if (!session.model) {
        throw new ServiceError(0, { field: "service", got: "no word yet of what it serves", takes: "its API key, or a moment" });
      }
      const found = await work(mine.signal);
      place("types-status").textContent = said(found.cells, what);
      show(found);
      session.answered(found.model);
    } catch (error) {
      if (error.name === "AbortError") return;
      place("types-status").textContent = "";
      showError(place("types-error"), error);
    }
  }

  function classifyAFile(file) {
    run(file.name, async (signal) => {
      const { limits } = session.model;
      if (file.size > limits.max_upload_bytes) {
        // Said before anything is sent: a connection that is closed in mid-upload tells nobody why.
        throw new ServiceError(413, {
          field: file.name,
          got: `${file.size.toLocaleString("en")} bytes`,
          takes: `files of up to ${limits.max_upload_bytes.toLocaleString("en")} bytes; more cells go through the jobs`,
        });
      }
      const options = {
        counts: place("counts").value.trim(),
        gene_column: place("gene-column").value.trim(),
        top: mostLabels(session.model),
        return_input_ids: true,
      };
      return classifyFile(file, options, signal);
    });
  }

  function classifyAnExample(example) {
    run(`example ${example.cell_id}`, async (signal) => {
      const cells = [{ input_ids: example.input_ids, cell_id: example.cell_id }];
      const found = await classify({ cells, top: mostLabels(session.model) }, signal);
      Object.assign(found.cells[0], { ...example, annotated: example.label, label: found.cells[0].label });
      return found;
    });
  }

  // ------------------------------------------------------------------ results

  function show(found) {
    const detail = el("div", { id: "cell", tabindex: "-1" });
    const open = (cell, focus) => {
      detail.replaceChildren(...oneCell(cell));
      choose(cell);
      if (focus) detail.focus();
    };
    const answered = found.cells.filter((cell) => !cell.reason);
    const several = found.cells.length > 1;
    place("types-result").replaceChildren(
      ...(several ? [summaries(answered, found.cells.length), cellTable(found.cells, open), download(found)] : []),
      ...(several ? [] : found.cells.filter((cell) => cell.reason).map(notAnswered)),
      detail,
      answeredBy(found.model),
    );
    if (answered.length) open(answered[0], false);
  }

  place("file").addEventListener("change", (event) => {
    const [file] = event.target.files;
    if (file) classifyAFile(file);
    event.target.value = ""; // the same file may be chosen again
  });
  place("example-form").addEventListener("submit", (event) => {
    event.preventDefault();
    const example = session.examples[Number(place("example").value)];
    if (example) classifyAnExample(example);
  });
  dropZone(classifyAFile);
}

function dropZone(take) {
  const zone = place("drop");
  let inside = 0; // entering a child comes before leaving its parent
  const mark = () => zone.classList.toggle("over", inside > 0);
  zone.addEventListener("dragenter", () => { inside += 1; mark(); });
  zone.addEventListener("dragleave", () => { inside -= 1; mark(); });
  zone.addEventListener("drop", (event) => {
    inside = 0;
    mark();
    const files = [...event.dataTransfer.files];
    if (files.length === 1) take(files[0]);
    else showError(place("types-error"), { field: "file", got: plural(files.length, "file"), takes: "one h5ad file at a time" });
  });
  // A file that misses the zone must not replace the page.
  for (const name of ["dragover", "drop"]) document.addEventListener(name, (event) => event.preventDefault());
}

function said(cells, what) {
  const answered = cells.filter((cell) => !cell.reason);
  if (cells.length === 1 && answered.length) {
    return `${what}: ${saidOf(answered[0])}.`;
  }
  const types = inTasks(answered).map(([task, them]) => {
    const found = new Set(them.map(({ label }) => label)).size;
    return task ? `${found} of ${task}` : plural(found, "type");
  });
  const left = cells.length - answered.length;
  const of = answered[0]?.tasks ? "; classes found: " : " of ";
  return `${what}: ${plural(answered.length, "cell")}${of}${types.join(", ") || "0 types"}${
    left ? `, ${left} without an answer` : ""}.`;
}

function notAnswered(cell) {
  return el("p", {}, `Cell ${cell.cell_id} has no answer: ${cell.reason}.`);
}

/** Give each task's name and what is said of each of some cells in it; nothing where there are no cells. */
function inTasks(cells) {
  const [first] = cells;
  return first ? ofEachTask(first).map(([task]) => [task, cells.map((cell) => (task ? cell.tasks[task] : cell))]) : [];
}

function summaries(cells, all) {
  const of = `${plural(cells.length, "cell")}${all > cells.length ? ` of ${all}` : ""}`;
  return el("div", { class: "beside" }, inTasks(cells).map(([task, them]) =>
    summary(`Predicted ${task || "types"} of ${of}`, task || "Type", them)));
}

function summary(title, heading, cells) {
  const groups = new Map();
  for (const cell of cells) groups.set(cell.label, [...(groups.get(cell.label) ?? []), cell]);
  const rows = [...groups].sort(([, a], [, b]) => b.length - a.length).map(([label, members]) => [
    label,
    number(members.length),
    [shareBar(members.length / cells.length), percent(members.length / cells.length)],
    percent(members.reduce((sum, cell) => sum + cell.probability, 0) / members.length),
  ]);
  return table(title, [heading, "Cells", "Share", "Mean probability"], rows, { numeric: [1, 3] });
}

function cellTable(cells, open) {
  const held = el("div", {});
  const tasks = inTasks(cells.filter((cell) => !cell.reason)).map(([task]) => task);
  const several = tasks.length > 0 && tasks[0] !== "";
  const columns = several
    ? ["Cell", ...tasks.flatMap((task) => [task, "Probability"]), "Genes unknown", "Details"]
    : ["Cell", "Type", "Probability", "Next", "Genes unknown", "Details"];
  const go = (offset, focus = true) => {
    const rows = cells.slice(offset, offset + CELLS_A_PAGE).map((cell) => {
      const name = cell.cell_id;
      if (cell.reason) return [name, "none", cell.reason, ...columns.slice(3).map(() => "")];
      const next = cell.top[1];
      return [
        name,
        ...ofEachTask(cell).flatMap(([, said]) => [said.label, [shareBar(said.probability), percent(said.probability)]]),
        ...(several ? [] : [next ? `${next.label} ${percent(next.probability)}` : "–"]),
        percent(cell.unknown_share),
        el("button", { type: "button", class: "quiet", "aria-label": `Show cell ${name}`, click: () => open(cell, true) }, "Show"),
      ];
    });
    const made = table("Cells", columns, rows, { numeric: [columns.indexOf("Genes unknown")] });
    held.replaceChildren(made, ...[pager("cells", offset, CELLS_A_PAGE, cells.length, go)].filter(Boolean));
    if (focus) made.querySelector(".scroll").focus(); // the button that was pressed is gone
  };
  go(0, false);
  return held;
}

function oneCell(cell) {
  const notes = [
    cell.annotated ? `Annotated as ${cell.annotated}.` : null,
    cell.annotated ? null : `${percent(cell.unknown_share)} of its expressed genes are unknown to the model.`,
    cell.input_ids ? `${plural(cell.input_ids.length, "token")}.` : null,
  ];
  return [
    el("h3", {}, `Cell ${cell.cell_id}`),
    el("p", { class: "note" }, notes.filter(Boolean).join(" ")),
    el("div", { class: "beside" }, ofEachTask(cell).map(([task, { top }]) => {
      const rows = top.map(({ label, probability }) => [label, shareBar(probability), percent(probability)]);
      const title = `Probability of each ${task || "type"} for cell ${cell.cell_id}`;
      return table(title, [task || "Type", "Share", "Probability"], rows, { numeric: [2], hidden: !task });
    })),
  ];
}

// ---------------------------------------------------------------------- CSV

function download({ cells, model }) {
  const known = cells.find((cell) => !cell.reason) ?? cells[0];
  const labelsOf = ({ top }) => top.map(({ label }) => label).sort();
  const shares = ({ top }, labels) => {
    const share = new Map(top.map(({ label, probability }) => [label, probability]));
    return labels.map((label) => share.get(label));
  };
  const labels = labelsOf(known);
  // Of several tasks the first stands where the only one of other models does, and each stands behind with its name.
  const tasks = Object.entries(known.tasks ?? {}).map(([task, said]) => ({ task, labels: labelsOf(said) }));
  const header = [
    "cell_id", "predicted_label", "conf_score", "unknown_share", "reason", ...labels.map((label) => `p_${label}`),
    ...tasks.flatMap(({ task, labels: own }) => [
      `predicted_label_${task}`, `conf_score_${task}`, ...own.map((label) => `p_${classOf(task, label)}`),
    ]),
    "model", "model_version", "model_digest",
  ];
  const lines = cells.map((cell) => [
    cell.cell_id, cell.label, cell.probability, cell.unknown_share, cell.reason, ...shares(cell, labels),
    ...tasks.flatMap(({ task, labels: own }) => {
      const said = cell.tasks[task];
      return [said.label, said.probability, ...shares(said, own)];
    }),
    model.name, model.version, model.digest,
  ]);
  const quoted = (value) => {
    const text = value === null || value === undefined ? "" : String(value);
    return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
  };
  const csv = [header, ...lines].map((line) => `${line.map(quoted).join(",")}\r\n`).join("");
  const save = () => {
    const url = URL.createObjectURL(new Blob([csv], { type: "text/csv" }));
    el("a", { href: url, download: "cell_types.csv" }).click();
    setTimeout(() => URL.revokeObjectURL(url), 10_000);
  };
  return el("p", {}, el("button", { type: "button", id: "csv", click: save }, "Download as CSV"));
}
