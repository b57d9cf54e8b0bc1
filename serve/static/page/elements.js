// Elements that several parts of the page are made of. Text only ever enters as text.

const SVG = "http://www.w3.org/2000/svg";

/** Make an element; attributes that are null or false are left out. */
export function el(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") made.addEventListener(name, value);
    else if (value !== null && value !== undefined && value !== false) made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return made;
}

function svg(tag, attributes, ...children) {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

/** Draw a share of 0 to 1. The number stands beside it, so readers of screens are spared the picture. */
export function shareBar(share) {
  const filled = svg("rect", { class: "filled", width: `${(100 * share).toFixed(2)}%`, height: "100%" });
  return svg("svg", { class: "bar", "aria-hidden": "true", focusable: "false" }, filled);
}

/** Draw a signed value from the middle: losses to the left, gains to the right. */
export function signedBar(value, largest) {
  const width = largest > 0 ? 50 * Math.min(1, Math.abs(value) / largest) : 0;
  const x = value < 0 ? 50 - width : 50;
  return svg(
    "svg", { class: "bar signed", "aria-hidden": "true", focusable: "false" },
    svg("rect", { class: value < 0 ? "loss" : "gain", x: `${x.toFixed(2)}%`, width: `${width.toFixed(2)}%`, height: "100%" }),
    svg("rect", { class: "middle", x: "50%", width: "1", height: "100%" }),
  );
}

export const percent = (share) => `${(100 * share).toFixed(1)} %`;

/** Write a number with a real minus, and with the sign of changes where asked. */
export function number(value, { digits = 4, sign = false } = {}) {
  if (value === null || value === undefined) return "–";
  if (Number.isInteger(value)) return value.toLocaleString("en");
  const text = Math.abs(value).toFixed(digits);
  if (Number(text) === 0) return text; // no sign for what is nothing at these digits
  return value < 0 ? `−${text}` : sign ? `+${text}` : text;
}

/** Write a p-value: small ones by their power of ten. */
export function chance(value) {
  return value > 0 && value < 0.001 ? value.toExponential(1).replace("-", "−") : number(value);
}

/** Say which model gave an answer. */
export function answeredBy({ name, version, digest }) {
  return el("p", { class: "note" }, `Answered by ${name}${version === null ? "" : `, version ${version}`}, digest ${digest}.`);
}

export const plural = (count, noun) => `${count.toLocaleString("en")} ${noun}${count === 1 ? "" : "s"}`;

let tables = 0;

/** Let a long name break where its parts end, into lines of some length. */
function breakable(text) {
  if (typeof text !== "string") return text;
  const lines = [""];
  for (const part of text.split(/(?<=[_.:-])/)) {
    if (lines.at(-1).length >= 12) lines.push("");
    lines[lines.length - 1] += part;
  }
  return lines.flatMap((line, at) => (at ? [el("wbr"), line] : [line]));
}

/**
 * Make a table whose first column names its rows, in a region that scrolls by keyboard where it is too wide.
 * Columns are texts, or elements for headings that do something; cells are texts, elements or lists of them.
 */
export function table(title, columns, rows, { numeric = [], hidden = false, sorted = null } = {}) {
  const id = `table-${(tables += 1)}`;
  const heading = (column, at) =>
    el("th", {
      scope: "col", class: numeric.includes(at) ? "numeric" : null, "aria-sort": sorted?.at === at ? sorted.order : null,
    }, column);
  const cell = (content, at) => {
    const attributes = { class: numeric.includes(at) ? "numeric" : null, ...(at === 0 ? { scope: "row" } : {}) };
    return el(at === 0 ? "th" : "td", attributes, at === 0 ? breakable(content) : content);
  };
  const made = el(
    "table", { "aria-labelledby": id },
    el("thead", {}, el("tr", {}, columns.map(heading))),
    el("tbody", {}, rows.map((row) => el("tr", {}, row.map(cell)))),
  );
  return el(
    "div", {},
    el("p", { id, class: hidden ? "covered" : "table-title" }, title),
    el("div", { class: "scroll", tabindex: "0", role: "region", "aria-labelledby": id }, made),
  );
}

/** Say what was wrong, where it will be read out. */
export function showError(place, error) {
  if (error === null) {
    place.replaceChildren();
    return;
  }
  const lines = error.takes === undefined
    ? [el("p", {}, `The page failed: ${error.message}`)]
    : [
        el("p", {}, el("strong", {}, "Field: "), error.field),
        el("p", {}, el("strong", {}, "Got: "), error.got),
        el("p", {}, el("strong", {}, "Takes: "), error.takes),
      ];
  place.replaceChildren(el("div", { class: "error" }, el("p", {}, el("strong", {}, "That was refused.")), lines));
}

/** Say which rows of how many are shown, with buttons to the others; nothing where they fit on one page. */
export function pager(what, offset, size, total, go) {
  if (total <= size) return null;
  const last = Math.min(offset + size, total);
  const turn = (label, to, off) =>
    el("button", { type: "button", class: "quiet", disabled: off, click: () => go(to) }, label);
  return el(
    "nav", { class: "row pager", "aria-label": `Pages of ${what}` },
    turn("Previous", Math.max(0, offset - size), offset === 0),
    el("span", {}, `${(offset + 1).toLocaleString("en")} to ${last.toLocaleString("en")} of ${total.toLocaleString("en")}`),
    turn("Next", offset + size, last >= total),
  );
}
