// The charts of the report's page, and what they do when they are pointed at, clicked, dragged over, or reached by keys.
// It runs behind render.js, whose rows a chart lists or opens.
"use strict";

const specs = read("specs");

const AXIS = { labelColor: "currentColor", titleColor: "currentColor", gridColor: "currentColor", gridOpacity: 0.12, domainColor: "currentColor", domainOpacity: 0.4, tickColor: "currentColor", tickOpacity: 0.4, labelFontSize: 12, titleFontSize: 12, titleFontWeight: 500, titlePadding: 8 };
const CONFIG = { background: "transparent", font: "system-ui, sans-serif", view: { stroke: null }, axis: AXIS, legend: { labelColor: "currentColor", labelFontSize: 12, symbolType: "circle" }, text: { color: "currentColor" } };

/** What a chart does when one of its bars or points is taken. */
function take(figure, datum) {
  const name = figure.dataset.name, column = figure.dataset.column;
  if (name === "length" && datum.row !== undefined) {
    shown = sorted(all);
    openRow(shown.findIndex((row) => row.row === datum.row));
  } else if (name === "scores" && datum.low !== undefined) {
    const list = datum.of === "selected" ? { round: String(tables[state.table].round) } : {};
    listRows({ span: [datum.low, datum.high], sort: "score", down: true, ...list });
  } else if ((name === "shares" || name === "ranges") && datum.name !== undefined) {
    const round = Object.entries(data.rounds).find((pair) => pair[1] === datum.of);
    listRows({ chosen: { [column]: datum.name }, ...(round ? { round: round[0] } : {}), ...(name === "ranges" ? { sort: "score", down: true } : {}) });
  }
}

function onInterval(figure, view) {
  const button = figure.querySelector(".take");
  view.addSignalListener("scores", (_, value) => {
    const span = Object.values(value || {})[0];
    button.hidden = !span;
    if (!span) return;
    button.textContent = `List the rows with scores from ${number(span[0])} to ${number(span[1])}`;
    button.onclick = () => listRows({ span: [Math.min(...span), Math.max(...span)], sort: "score", down: true });
  });
}

/** Arrow keys go through the marks of a chart, Enter takes one: as the mouse does by pointing and clicking. */
function onKeys(figure, plot) {
  let at = -1;
  const marks = () =>
    [...plot.querySelectorAll(".role-mark path, .role-legend-symbol path")].filter((path) => {
      const item = path.__data__;
      return item && item.datum && path.getAttribute("aria-label") !== null | path.closest(".role-legend-symbol") !== null && path.getBBox().width > 0;
    });
  const point = (kind, path) => {
    const box = path.getBoundingClientRect();
    const where = { bubbles: true, clientX: box.x + box.width / 2, clientY: box.y + box.height / 2 };
    path.dispatchEvent(new (kind === "click" ? MouseEvent : PointerEvent)(kind, where));
  };
  plot.addEventListener("keydown", (event) => {
    const found = marks();
    const by = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    if (by) {
      event.preventDefault();
      found.forEach((path) => path.classList.remove("here"));
      at = (at + by + found.length) % found.length;
      found[at]?.classList.add("here");
      if (found[at]) point("pointermove", found[at]);
      figure.querySelector(".reading").textContent = found[at]?.getAttribute("aria-label") || String(found[at]?.__data__.datum.label ?? "");
    } else if (event.key === "Enter" && found[at]) {
      event.preventDefault();
      if (found[at].closest(".role-legend-symbol")) point("click", found[at]);
      else take(figure, found[at].__data__.datum);
    }
  });
  plot.addEventListener("blur", () => {
    at = -1;
    marks().forEach((path) => path.classList.remove("here"));
    figure.querySelector(".reading").textContent = "";
  });
}

async function drawChart(figure) {
  const plot = figure.querySelector(".plot");
  const options = { mode: "vega-lite", ast: true, actions: false, renderer: "svg", config: CONFIG, bind: figure.querySelector(".menu"), tooltip: { theme: "page", disableDefaultStyle: true } };
  const { view } = await vegaEmbed(plot, specs[figure.id], options);
  views.push(view);
  const signals = view.getState().signals;
  if ("table" in signals) view.addSignalListener("table", (_, name) => {
    pickTable(tables.findIndex((table) => table.name === name));
    filtersToState();
    drawList();
  });
  if (figure.dataset.name === "scores") onInterval(figure, view);
  let pressed = null;
  plot.addEventListener("pointerdown", (event) => (pressed = [event.clientX, event.clientY]), true);
  view.addEventListener("click", (event, item) => {
    const moved = pressed && Math.hypot(event.clientX - pressed[0], event.clientY - pressed[1]) > 4;
    if (item && item.datum && !moved && !figure.querySelector(".take:not([hidden])")) take(figure, item.datum);
  });
  onKeys(figure, plot);
}

async function drawCharts() {
  for (const figure of document.querySelectorAll("figure.chart")) {
    try {
      await drawChart(figure);
    } catch (error) {
      console.error(error);
      figure.querySelector(".plot").replaceChildren(make("p", { className: "cut", textContent: `This chart could not be drawn (${error.message}). Its figures are in the table.` }));
    }
  }
  document.documentElement.dataset.drawn = "yes";
}

drawCharts();
