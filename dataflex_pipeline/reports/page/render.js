// The rows of the report's page: searched, sorted, filtered, opened. Charts are in charts.js, which runs after it.
// Whatever comes from the data is written with textContent; nothing is fetched.
"use strict";

const read = (id) => JSON.parse(document.getElementById(id).textContent);
const data = read("data");
const PAGE = 50;
const views = [];

/** An element with properties and children; a child that is a string becomes text. */
function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.startsWith("aria-")) element.setAttribute(name, value);
    else element[name] = value;
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

const place = (row) => row.toLocaleString("en-US");
function number(value) {
  if (typeof value !== "number") return value === null || value === undefined ? "" : String(value);
  return Number.isInteger(value) && Math.abs(value) < 1e9 ? place(value) : String(Number(value.toPrecision(4)));
}

// Rows, found and sorted

const all = data.rows || [];
const tables = data.tables || [];
const state = { search: "", list: "", table: 0, round: "", chosen: {}, span: null, sort: "row", down: false, page: 0 };

for (const row of all) {
  row.said = row.turns.map((turn) => turn.slice(1, 4).join("")).join(" \u2014 ");
  row.text = `${row.row} ${row.id} ${row.source} ${row.said} ${Object.values(row.own).join(" ")}`.toLowerCase();
}
const category = (row, column) => {
  const value = column === "source" ? row.source : row.own[column];
  return value === undefined || value === null ? "(none)" : String(value);
};
const score = (row) => (row.scores[state.table] || [null])[0];
const rank = (row) => (row.scores[state.table] || [null, null])[1];
const SORTS = {
  row: (row) => row.row,
  source: (row) => row.source,
  text: (row) => row.said.trim().toLowerCase(),
  response: (row) => row.response,
  score,
  rank,
  selected: (row) => Object.keys(row.selected).length,
};

function matching() {
  const words = state.search.toLowerCase().split(/\s+/).filter(Boolean);
  const list = data.lists.indexOf(state.list);
  return all.filter(
    (row) =>
      words.every((word) => row.text.includes(word)) &&
      (list < 0 || row.in.includes(list)) &&
      (state.round === "" || state.round in row.selected) &&
      Object.entries(state.chosen).every(([column, value]) => category(row, column) === value) &&
      (state.span === null || (score(row) !== null && score(row) >= state.span[0] && score(row) <= state.span[1])),
  );
}

function sorted(rows) {
  const key = SORTS[state.sort], sign = state.down ? -1 : 1;
  return [...rows].sort((one, other) => {
    const a = key(one), b = key(other);
    if (a === b) return one.row - other.row;
    if (a === null || a === undefined) return 1;
    if (b === null || b === undefined) return -1;
    return (a < b ? -1 : 1) * sign;
  });
}

// The list

const list = document.getElementById("list");
let shown = [];
const one = new Set(all.map((row) => row.source)).size < 2;
const HEADS = [
  ["row", "Row", "n"],
  ["text", "Text", "text"],
  ["source", "Source", one ? "none" : "less"],
  ["response", "Response tokens", "n less"],
  ["score", "Score", "n"],
  ["rank", "Rank", "n less"],
  ["selected", "Selected in", "less"],
];

function drawHead() {
  const cells = HEADS.map(([key, title, kind]) => {
    const on = state.sort === key;
    const arrow = on ? (state.down ? " ↓" : " ↑") : "";
    const button = make("button", { type: "button", textContent: title + arrow });
    button.addEventListener("click", () => {
      Object.assign(state, { sort: key, down: on ? !state.down : key === "score" || key === "selected", page: 0 });
      drawList();
      list.tHead.querySelectorAll("button")[HEADS.findIndex((head) => head[0] === key)].focus();
    });
    return make("th", { className: kind, scope: "col", "aria-sort": on ? (state.down ? "descending" : "ascending") : "none" }, button);
  });
  list.tHead.replaceChildren(make("tr", {}, ...cells));
}

function drawRow(row, position) {
  const open = make("button", { type: "button", className: "open", textContent: place(row.row), "aria-label": `open row ${row.row}` });
  const text = make("span", { textContent: row.said.trim().slice(0, 300) || "(no text)", dir: "auto" });
  const names = Object.keys(row.selected).map((name) => data.rounds[name]);
  const rounds = names.length ? [make("span", { className: "badge", textContent: names.at(-1), title: names.join(", ") })] : [];
  if (names.length > 1) rounds.push(make("span", { className: "badge", textContent: `+${names.length - 1}`, title: names.join(", ") }));
  if (row.reason !== undefined) rounds.push(make("span", { className: "cut", textContent: "not usable" }));
  const line = make(
    "tr",
    {},
    make("td", { className: "n" }, open),
    make("td", { className: "text" }, text),
    make("td", { className: one ? "none" : "less", textContent: row.source }),
    make("td", { className: "n less", textContent: number(row.response) }),
    make("td", { className: "n", textContent: number(score(row)) }),
    make("td", { className: "n less", textContent: number(rank(row)) }),
    make("td", { className: "less" }, ...rounds),
  );
  line.addEventListener("click", () => openRow(position));
  return line;
}

function drawList() {
  const found = sorted(matching());
  shown = found;
  const last = Math.max(Math.ceil(found.length / PAGE) - 1, 0);
  state.page = Math.min(state.page, last);
  const first = state.page * PAGE;
  drawHead();
  list.tBodies[0].replaceChildren(...found.slice(first, first + PAGE).map((row, offset) => drawRow(row, first + offset)));
  const many = found.length > PAGE ? `, ${first + 1} to ${Math.min(first + PAGE, found.length)} shown` : "";
  document.getElementById("found").textContent =
    found.length === all.length ? `All ${place(all.length)} rows of this page${many}` : `${place(found.length)} of ${place(all.length)} rows of this page match${many}`;
  drawPages(last);
  drawChips();
}

function drawPages(last) {
  const turn = (title, to, off) => {
    const button = make("button", { type: "button", textContent: title, disabled: off });
    button.addEventListener("click", () => {
      state.page = to;
      drawList();
      document.getElementById("rows").scrollIntoView();
    });
    return button;
  };
  const pages = document.getElementById("pages");
  if (last === 0) return pages.replaceChildren();
  pages.replaceChildren(
    turn("← Before", state.page - 1, state.page === 0),
    make("span", { textContent: `page ${state.page + 1} of ${last + 1}` }),
    turn("Next →", state.page + 1, state.page === last),
  );
}

function drawChips() {
  const chips = [];
  const chip = (text, off) => {
    const button = make("button", { type: "button", textContent: `${text} ✕`, "aria-label": `no longer only ${text}` });
    button.addEventListener("click", () => {
      off();
      filtersToState();
      drawList();
    });
    chips.push(button);
  };
  if (state.span) chip(`score of ${tables[state.table].name} from ${number(state.span[0])} to ${number(state.span[1])}`, () => (state.span = null));
  for (const [column, value] of Object.entries(state.chosen)) chip(`${titled(column)}: ${value}`, () => delete state.chosen[column]);
  if (state.round !== "") chip(`selected in ${data.rounds[state.round]}`, () => (state.round = ""));
  document.getElementById("chips").replaceChildren(...chips);
}

// Filters

const titled = (column) => column.replace(/^original_/, "");
const menus = {};

function menu(name, title, options, changed) {
  const select = make("select", { id: `by-${name}` }, ...options.map(([value, text]) => make("option", { value, textContent: text })));
  select.addEventListener("change", () => {
    changed(select.value);
    state.page = 0;
    drawList();
  });
  menus[name] = select;
  document.getElementById("filters").append(make("label", {}, title, select));
}

function makeFilters() {
  const lists = { selected: "selected", best: "best scores", worst: "worst scores", random: "at random", invalid: "not usable" };
  const there = data.lists.filter((_, number) => all.some((row) => row.in.includes(number)));
  menu("list", "List", [["", "all"], ...there.map((name) => [name, lists[name]])], (value) => (state.list = value));
  if (tables.length) menu("table", "Scores of", tables.map((table, number) => [String(number), table.name]), (value) => pickTable(Number(value)));
  const rounds = Object.entries(data.rounds);
  if (rounds.length) menu("round", "Selected in", [["", "any round or none"], ...rounds], (value) => (state.round = value));
  for (const column of new Set(["source", ...data.categories])) {
    const values = [...new Set(all.map((row) => category(row, column)))].sort();
    if (values.length < 2) continue;
    menu(column, titled(column), [["", "all"], ...values.map((value) => [value, value])], (value) => {
      if (value === "") delete state.chosen[column];
      else state.chosen[column] = value;
    });
  }
  const search = document.getElementById("search");
  search.addEventListener("input", () => {
    Object.assign(state, { search: search.value, page: 0 });
    drawList();
  });
  document.getElementById("filters").addEventListener("submit", (event) => event.preventDefault());
}

function filtersToState() {
  menus.list.value = state.list;
  if (menus.table) menus.table.value = String(state.table);
  if (menus.round) menus.round.value = state.round;
  for (const [name, select] of Object.entries(menus)) {
    if (!["list", "table", "round"].includes(name)) select.value = state.chosen[name] || "";
  }
}

/** Show the scores of a table in the list, and in every chart that has it. */
function pickTable(number) {
  if (number < 0 || number === state.table) return;
  Object.assign(state, { table: number, span: null });
  for (const view of views) {
    if ("table" in view.getState().signals && view.signal("table") !== tables[number].name) view.signal("table", tables[number].name).runAsync();
  }
}

/** Show only what a chart was asked for, and go to the list. */
function listRows(change) {
  Object.assign(state, { search: "", list: "", round: "", chosen: {}, span: null, page: 0 }, change);
  document.getElementById("search").value = "";
  filtersToState();
  drawList();
  document.getElementById("rows").scrollIntoView();
  document.getElementById("search").focus({ preventScroll: true });
}

// One row

const dialog = document.getElementById("row");
let opened = -1;

function section(title, ...children) {
  return make("section", {}, make("h3", { textContent: title }), ...children);
}

function grid(heads, lines) {
  const cell = (value) => make("td", { className: typeof value === "number" ? "n" : "", textContent: number(value) });
  const head = make("tr", {}, ...heads.map((name) => make("th", { scope: "col", textContent: name })));
  const body = lines.map((line) => make("tr", {}, ...line.map(cell)));
  return make("div", { className: "scroll" }, make("table", {}, make("thead", {}, head), make("tbody", {}, ...body)));
}

function drawTurn([role, before, learnt, after, cut]) {
  const said = make("div", { className: "said", dir: "auto" }, before, learnt ? make("mark", { textContent: learnt }) : null, after);
  const more = cut ? make("div", { className: "cut", textContent: `${place(cut)} more characters are not on this page.` }) : null;
  return make("div", { className: "turn" }, make("div", { className: "role", textContent: role || "as the model reads it" }), said, more);
}

function drawScores(row) {
  const lines = [], reasons = [];
  tables.forEach((table, number) => {
    const values = row.scores[number];
    if (!values) return;
    const [value, at, probability, reason, ...own] = values;
    const more = table.columns.map((name, column) => [name, own[column]]).filter((pair) => pair[1] !== null);
    lines.push([table.name, value, at, probability, more.map(([name, one]) => `${name} ${number_(one)}`).join(", ")]);
    if (reason) reasons.push(make("p", { className: "meta", textContent: `${table.name}: ${reason}` }));
  });
  return lines.length ? section("Scores", grid(["of", "score", "rank", "probability", "the method's own columns"], lines), ...reasons) : null;
}
const number_ = (value) => (typeof value === "number" ? number(value) : String(value));

function drawSelected(row) {
  const lines = Object.entries(row.selected).map(([name, [at, times, weight, probability]]) => [data.rounds[name], at, times, weight, probability]);
  if (!lines.length) return make("p", { className: "meta", textContent: "Selected in no round." });
  const ranked = lines.some((line) => line[1] !== null);
  const heads = ["in", ...(ranked ? ["rank"] : []), "times", "weight", "probability"];
  return section("Selected", grid(heads, ranked ? lines : lines.map((line) => [line[0], ...line.slice(2)])));
}

function drawNear(row) {
  const groups = new Set(Object.values(data.targets).map((target) => target.group)).size;
  return data.near.map((title, number) => {
    const targets = row.near[number] || [];
    if (!targets.length) return null;
    const lines = targets.map(([target, cosine]) => {
      const found = data.targets[target];
      const text = found.turns.map(([role, said, length]) => `${role}: ${said}${length > said.length ? " ..." : ""}`).join("\n");
      return make("div", { className: "turn" }, make("div", { className: "role", textContent: `target row ${place(target)}${groups > 1 ? `, ${found.group}` : ""}, cosine ${cosine.toFixed(3)}` }), make("div", { className: "said", dir: "auto", textContent: text }));
    });
    return section(title, ...lines);
  });
}

function openRow(position) {
  const row = shown[position];
  if (!row) return;
  opened = position;
  const step = (title, by, name) => {
    const button = make("button", { type: "button", textContent: title, disabled: !shown[position + by], "aria-label": name });
    button.addEventListener("click", () => openRow(position + by));
    return button;
  };
  const close = make("button", { type: "button", textContent: "Close", autofocus: true });
  close.addEventListener("click", () => dialog.close());
  const facts = [`${row.source}${row.file ? `, ${row.file}` : ""}${row.line ? `, line ${place(row.line)}` : ""}`, `${number(row.tokens)} tokens, ${number(row.response)} of them carry loss`, `row_id ${row.id}`];
  const own = Object.entries(row.own).filter((pair) => pair[1] !== "").map(([name, value]) => `${titled(name)}: ${value}`);
  dialog.replaceChildren(
    make("div", { className: "bar" }, make("h2", { id: "row-title", textContent: `Row ${place(row.row)}` }), step("←", -1, "the row before"), step("→", 1, "the next row"), close),
    make("p", { className: "meta", textContent: facts.join(" · ") }),
    make("p", { className: "meta", textContent: own.join(" · ") }),
    ...(row.reason !== undefined ? [make("p", { className: "cut", textContent: `Not usable: ${row.reason}` })] : []),
    ...(row.note ? [make("p", { className: "meta", textContent: `Note: ${row.note}` })] : []),
    section("Conversation", make("p", { className: "meta" }, make("mark", { textContent: "Marked" }), " is what carries loss."), ...row.turns.map(drawTurn)),
    ...[drawScores(row), drawSelected(row), ...drawNear(row)].filter(Boolean),
  );
  dialog.scrollTop = 0;
  if (!dialog.open) dialog.showModal();
}

dialog.addEventListener("click", (event) => event.target === dialog && dialog.close());
dialog.addEventListener("close", () => {
  const page = Math.floor(opened / PAGE);
  if (page !== state.page) {
    state.page = page;
    drawList();
  }
  list.tBodies[0].querySelectorAll(".open")[opened % PAGE]?.focus();
});
dialog.addEventListener("keydown", (event) => {
  if (event.key === "ArrowLeft") openRow(opened - 1);
  else if (event.key === "ArrowRight") openRow(opened + 1);
});

document.addEventListener("keydown", (event) => {
  const typing = /^(INPUT|SELECT|TEXTAREA)$/.test(document.activeElement.tagName);
  if (event.key === "/" && !typing && !dialog.open) {
    event.preventDefault();
    document.getElementById("search").focus();
  }
  if ((event.key === "ArrowDown" || event.key === "ArrowUp") && document.activeElement.classList.contains("open")) {
    event.preventDefault();
    const buttons = [...list.querySelectorAll(".open")];
    buttons[buttons.indexOf(document.activeElement) + (event.key === "ArrowDown" ? 1 : -1)]?.focus();
  }
});

makeFilters();
if (tables.length) Object.assign(state, { sort: "score", down: true });
drawList();
