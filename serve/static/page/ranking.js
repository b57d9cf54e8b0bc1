// The latest screen's ranking, sorted, searched and paged by the service.

import { screen } from "./service.js";
import { chance, el, number, pager, plural, showError, table } from "./elements.js";

const ROWS_A_PAGE = 25;
const place = (id) => document.getElementById(id);
// Similarities are all close to 1: their differences can only be seen as distances from it.
const isSimilarity = (column) => column === "similarity";
const isChance = (column) => /^(p|fdr)(_|$)/.test(column);

/** Set the section up; gives a function that loads the ranking. */
export function rankingSection(session) {
  const query = { offset: 0, limit: ROWS_A_PAGE, search: "" };
  let running = null;

  async function load({ focus = null } = {}) {
    running?.abort();
    const mine = (running = new AbortController());
    showError(place("ranking-error"), null);
    try {
      const found = await screen(query, mine.signal);
      place("ranking-form").hidden = false;
      about(found.screen);
      show(found);
      place("ranking-status").textContent = `${plural(found.total, "row")}${query.search ? ` with “${query.search}”` : ""}${
        query.sort ? `, sorted by ${heading(query.sort)}` : ", as ranked by its test"}.`;
      if (focus) place("ranking-result").querySelector(focus)?.focus();
    } catch (error) {
      if (error.name === "AbortError") return;
      place("ranking-status").textContent = "";
      if (error.status === 404) {
        place("ranking-about").replaceChildren(
          el("p", { class: "note" }, `Nothing to show: ${error.got}. It takes ${error.takes}.`),
        );
        place("ranking-result").replaceChildren();
        return;
      }
      showError(place("ranking-error"), error);
    }
  }

  function sortBy(column) {
    // First the end that is looked for: the largest values, or names from A.
    const first = !["gene", "symbol"].includes(column) && !isChance(column) && !isSimilarity(column);
    query.descending = query.sort === column ? !query.descending : first;
    query.sort = column;
    query.offset = 0;
    load({ focus: `button[data-column="${CSS.escape(column)}"]` });
  }

  function show({ columns, rows, total, offset }) {
    const numeric = columns.map((column, at) => (rows.some((row) => typeof row[column] === "number") ? at : -1));
    const headings = columns.map((column) => {
      const sorted = query.sort === column;
      const arrow = sorted ? (pointsDown(column) ? " ↓" : " ↑") : "";
      return el("button", { type: "button", class: "sort", "data-column": column, click: () => sortBy(column) },
        heading(column), el("span", { "aria-hidden": "true" }, arrow));
    });
    const at = columns.indexOf(query.sort);
    const order = at >= 0 ? (pointsDown(query.sort) ? "descending" : "ascending") : null;
    const cells = rows.map((row) => columns.map((column) => value(column, row[column])));
    const go = (to) => {
      query.offset = to;
      load({ focus: ".scroll" });
    };
    place("ranking-result").replaceChildren(
      ...[
        table("Ranking of the latest screen", headings, cells, { numeric, hidden: true, sorted: at >= 0 ? { at, order } : null }),
        pager("the ranking", offset, ROWS_A_PAGE, total, go),
      ].filter(Boolean),
    );
  }

  const pointsDown = (column) => Boolean(query.descending) !== isSimilarity(column);

  function about(plan) {
    const of = plan.screen ?? {};
    const facts = {
      Perturbation: of.perturbation,
      Start: of.start,
      Goal: of.goal ?? plan.state,
      Alternatives: of.alternatives?.join(", "),
      Cells: of.filter && Object.entries(of.filter).map(([name, values]) => `${name} ${values.join(", ")}`).join("; "),
      Test: plan.test?.replaceAll("_", " "),
      Reading: of.embedding && `${of.embedding}, layer ${of.layer}, ${of.comparison}`,
      Model: of.model && `${of.model}, ${of.model === session.model.digest ? "the one" : "another than"} served here`,
    };
    place("ranking-about").replaceChildren(
      el("dl", { class: "facts" }, Object.entries(facts).filter(([, fact]) => fact).map(([name, fact]) =>
        el("div", {}, el("dt", {}, name), el("dd", {}, fact)))),
    );
  }

  place("ranking-form").addEventListener("submit", (event) => {
    event.preventDefault();
    query.search = place("search").value.trim();
    query.offset = 0;
    load();
  });
  return load;
}

const heading = (column) => (isSimilarity(column) ? "1 − similarity" : column.replaceAll("_", " "));

function value(column, content) {
  if (typeof content === "boolean") return content ? "yes" : "no";
  if (typeof content === "number" && isChance(column)) return chance(content);
  if (typeof content === "number") return number(isSimilarity(column) ? 1 - content : content, { digits: 5 });
  return content ?? "–";
}
