// Perturbation of one cell: which genes, how, and what it does to the cell.

import { genes as allGenes, perturb } from "./service.js";
import { answeredBy, el, number, percent, plural, shareBar, showError, signedBar, table } from "./elements.js";
import { classOf, ofEachTask, saidOf, stateOf } from "./tasks.js";

const AFFECTED_GENES = 10;
const GENES_AT_ONCE = 20;
const MOVED = ["inhibit", "activate"];
const place = (id) => document.getElementById(id);

/** Set the section up; gives a function that is told which cell is perturbed, null for none. */
export function perturbationSection(session) {
  let cell = null;
  let chosen = [];
  let running = null;
  let names = null; // symbols and keys of all genes, by token id

  // ------------------------------------------------------------------ the cell

  async function use(next) {
    running?.abort();
    cell = next;
    const form = place("perturb-cell");
    // A model of one layer has none before the last, in which events are compared.
    const possible = next === null || session.model.perturbations.length > 0;
    place("perturb-fields").disabled = next === null || !possible;
    place("perturb-result").replaceChildren();
    place("perturb-status").textContent = "";
    showError(place("perturb-error"), null);
    place("cell-genes").replaceChildren();
    if (next === null) {
      form.textContent = "First choose a cell above.";
      return;
    }
    if (!possible) {
      form.textContent = "The model has one layer only: perturbations are compared in the layer before the last.";
      return;
    }
    form.textContent = `Cell ${next.cell_id}: ${saidOf(next)}.`;
    try {
      const genes = await genesOf(next);
      if (cell !== next) return; // another one was chosen meanwhile
      cell.ranked = genes;
      place("cell-genes").replaceChildren(
        ...genes.map(({ name, symbol }) => el("option", { value: symbol }, name === symbol ? "" : name)),
      );
    } catch (error) {
      showError(place("perturb-error"), error);
    }
  }

  async function genesOf({ genes, symbols, input_ids: ids }) {
    if (genes) return genes.map((name, at) => ({ name, symbol: symbols[at] }));
    if (names?.vocabulary_digest !== session.model.vocabulary_digest) names = await allGenes();
    return ids
      .filter((id) => !names.names[id].startsWith("<"))
      .map((id) => ({ name: names.names[id], symbol: names.symbols[id] }));
  }

  // ------------------------------------------------------------------ its genes

  const most = () => session.model.limits.max_candidate_genes;

  /** Find a gene of the cell by key or symbol; what is none of its genes is left for the service to look up. */
  function find(text) {
    const same = (other) => other.toUpperCase() === text.toUpperCase();
    const found = (cell?.ranked ?? []).filter(({ name, symbol }) => same(name) || same(symbol));
    return found.length === 1 ? found[0] : { name: text, symbol: text };
  }

  function add(genes, focus = true) {
    for (const gene of genes) if (!chosen.some(({ name }) => name === gene.name)) chosen.push(gene);
    showGenes();
    place("gene").value = "";
    if (focus) place("gene").focus();
  }

  function showGenes() {
    const remove = (gene) => {
      chosen = chosen.filter((other) => other !== gene);
      showGenes();
      place("gene").focus();
    };
    place("genes").replaceChildren(
      ...chosen.map((gene) =>
        el("li", {}, el("button", {
          type: "button", class: "chip", title: gene.name, "aria-label": `Remove ${gene.symbol}`, click: () => remove(gene),
        }, gene.symbol, el("span", { "aria-hidden": "true" }, " ×")))),
    );
    place("perturb-status").textContent = chosen.length ? `${plural(chosen.length, "gene")} chosen.` : "";
  }

  const typed = () => place("gene").value.split(/[\s,;]+/).filter(Boolean).map(find);

  place("gene-add").addEventListener("click", () => add(typed()));
  place("gene").addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || !place("gene").value.trim()) return; // with nothing typed, Enter sends the form
    event.preventDefault();
    add(typed());
  });
  place("gene-top").addEventListener("click", () => {
    const room = Math.max(0, most() - chosen.length);
    const others = (cell?.ranked ?? []).filter(({ name }) => !chosen.some((gene) => gene.name === name));
    add(others.slice(0, Math.min(room, GENES_AT_ONCE)), false);
  });
  place("gene-clear").addEventListener("click", () => {
    chosen = [];
    showGenes();
    place("gene").focus();
  });

  function showRankShift() {
    const moved = MOVED.includes(place("kind").value);
    place("rank-shift").hidden = place("rank-shift-label").hidden = !moved;
  }
  place("kind").addEventListener("change", showRankShift);
  showRankShift();

  // ------------------------------------------------------------------ asking

  place("perturb-form").addEventListener("submit", async (event) => {
    event.preventDefault();
    add(typed(), false);
    showError(place("perturb-error"), null);
    place("perturb-result").replaceChildren();
    if (!chosen.length) {
      showError(place("perturb-error"), { field: "genes", got: "nothing", takes: `1 to ${most()} genes` });
      return;
    }
    const kind = place("kind").value;
    const body = {
      cell: { input_ids: cell.input_ids, cell_id: cell.cell_id },
      genes: chosen.map(({ name }) => name),
      perturbation: kind,
      together: place("together").checked,
      affected_genes: Math.min(AFFECTED_GENES, session.model.limits.max_affected_genes),
      ...(MOVED.includes(kind) ? { rank_shift: Number(place("rank-shift").value) } : {}),
      ...(place("goal").value ? { goal: place("goal").value } : {}),
    };
    running?.abort();
    const mine = (running = new AbortController());
    place("perturb-status").textContent = "Perturbing …";
    try {
      const found = await perturb(body, mine.signal);
      place("perturb-status").textContent = said(found);
      place("perturb-result").replaceChildren(...results(found, body.together));
      session.answered(found.model);
    } catch (error) {
      if (error.name === "AbortError") return;
      place("perturb-status").textContent = "";
      showError(place("perturb-error"), error);
    }
  });

  return use;
}

// ---------------------------------------------------------------------- results

const named = ({ symbols }) => symbols.join(" + ");

function said({ events, skipped, goal }) {
  const by = goal ? `ranked by shift to ${goal}` : "ranked by how far the other genes moved";
  const left = skipped.length ? ` ${plural(skipped.length, "event")} skipped, listed below.` : "";
  return `${plural(events.length, "event")}, ${by}.${left}`;
}

function results(found, together) {
  const { events, skipped, goal } = found;
  const tasks = ofEachTask(found).map(([task, { probabilities }]) => ({
    task, before: probabilities, label: Object.entries(probabilities).sort(([, a], [, b]) => b - a)[0][0],
  }));
  const changes = events.flatMap((event) =>
    ofEachTask(event).flatMap(([, { probability_change: change }]) => Object.values(change).map(Math.abs)));
  const largest = { moved: Math.max(...events.map(moved), 0), shift: largestShift(events), change: Math.max(...changes, 0) };
  // Towards the goal and away from what it is; all other states stand with each event.
  const known = Object.keys(events[0]?.shifts ?? {});
  const states = [...new Set([goal, ...tasks.map(({ task, label }) => stateOf(task, label, known))])].filter(Boolean);
  const classes = tasks.flatMap(({ task, before, label }) => {
    const aim = Object.keys(before).find((other) => goal && stateOf(task, other, known) === goal);
    return [...new Set([label, aim])].filter(Boolean).map((of) => ({ task, of }));
  });
  const rows = events.map((event) => [
    named(event),
    [shareBar(largest.moved ? moved(event) / largest.moved : 0), number(moved(event), { digits: 5 })],
    ...states.map((state) => signed(event.shifts[state], largest.shift, 5)),
    ...classes.map(({ task, of }) => signed(changeOf(event, task)[of], largest.change, 4)),
  ]);
  const columns = [
    "Gene", "Moved (1 − cosine)", ...states.map((state) => `Shift to ${state}`),
    ...classes.map(({ task, of }) => `Change of p(${classOf(task, of)})`),
  ];
  const how = together ? "all genes at once" : "one gene at a time";
  const what = `To ${found.perturbation} ${how} in cell ${found.cell_id}`;
  return [
    events.length ? table(what, columns, rows) : el("p", {}, "No event could be measured."),
    skipped.length
      ? table("Skipped", ["Gene", "Why"], skipped.map(({ genes, reason }) => [genes.join(" + "), reason]))
      : null,
    events.length ? el("h3", {}, `Each event: all ${tasks.length > 1 ? "tasks" : "types"}, and the genes it affects most`) : null,
    ...events.map((event, at) => detail(event, tasks, largest, at === 0)),
    answeredBy(found.model),
  ].filter(Boolean);
}

const moved = (event) => 1 - event.similarity;
const largestShift = (events) => Math.max(...events.flatMap(({ shifts }) => Object.values(shifts).map(Math.abs)), 0);
const signed = (value, largest, digits) => [signedBar(value, largest), number(value, { digits, sign: true })];

const changeOf = (event, task) => (task ? event.tasks[task] : event).probability_change;

function probabilityTable(event, { task, before }, largest) {
  const states = Object.keys(event.shifts);
  const change = changeOf(event, task);
  const rows = Object.keys(before).sort((a, b) => Math.abs(change[b]) - Math.abs(change[a])).map((of) => [
    of,
    percent(before[of]),
    percent(Math.max(0, before[of] + change[of])),
    signed(change[of], largest.change, 4),
    ...(states.length ? [number(event.shifts[stateOf(task, of, states)], { digits: 5, sign: true })] : []),
  ]);
  const columns = [task || "Type", "Before", "After", "Change", ...(states.length ? ["Shift to it"] : [])];
  return table(`Probability of each ${task || "type"} with ${named(event)} perturbed`, columns, rows, { numeric: [1, 2, 4] });
}

/** Show the states that are no class of the model's. */
function otherStates(event, tasks) {
  const states = Object.keys(event.shifts);
  const classes = new Set(tasks.flatMap(({ task, before }) => Object.keys(before).map((of) => stateOf(task, of, states))));
  const rows = states.filter((state) => !classes.has(state)).map((state) =>
    [state, number(event.shifts[state], { digits: 5, sign: true })]);
  const title = `Other states with ${named(event)} perturbed`;
  return rows.length ? table(title, ["State", "Shift to it"], rows, { numeric: [1] }) : null;
}

function detail(event, tasks, largest, open) {
  const name = named(event);
  const keys = event.affected_genes.some(({ gene, symbol }) => gene !== symbol);
  const affected = event.affected_genes.map(({ gene, symbol, similarity }) => [
    symbol, ...(keys ? [gene] : []), number(1 - similarity, { digits: 5 }),
  ]);
  return el(
    "details", { open },
    el("summary", {}, name),
    el("div", { class: "beside" },
      tasks.map((task) => probabilityTable(event, task, largest)),
      otherStates(event, tasks),
      affected.length
        ? table(`Genes most affected by ${name}`, ["Gene", ...(keys ? ["Key"] : []), "Moved (1 − cosine)"], affected, {
            numeric: [keys ? 2 : 1],
          })
        : el("p", { class: "note" }, "It leaves no other gene.")),
  );
}
