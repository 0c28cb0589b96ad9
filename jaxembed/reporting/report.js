// Draws the charts of the page in the reader's color scheme, and lets the reader browse the neighbors of queries.
// Texts of the data reach the page as text nodes only.

const readData = (id) => JSON.parse(document.getElementById(id).textContent);
const readColor = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const darkScheme = matchMedia("(prefers-color-scheme: dark)");

function makeTheme() {
  const [ink, quiet, line] = ["--ink", "--quiet", "--line"].map(readColor);
  const series = readColor("--series").split(/\s+/);
  const ramp = readColor("--ramp").split(/\s+/);
  return {
    background: "transparent",
    font: readColor("--font"),
    view: { stroke: null },
    axis: {
      labelColor: quiet, titleColor: quiet, titleFontWeight: "normal", labelFontSize: 11, titleFontSize: 11,
      gridColor: line, domainColor: line, tickColor: line, titlePadding: 8, labelOverlap: true,
    },
    legend: { labelColor: ink, titleColor: quiet, titleFontWeight: "normal", labelFontSize: 11, titleFontSize: 11, symbolOpacity: 1 },
    range: { category: series, heatmap: ramp, ramp },
    mark: { color: series[0] },
  };
}

function pickPoint(figure, item) {
  const picked = figure.querySelector(".picked");
  const datum = item && item.datum;
  if (!datum || typeof datum.text !== "string") return;
  const name = document.createElement("strong");
  name.textContent = datum.source;
  picked.replaceChildren(name, " ", datum.text);
  picked.hidden = false;
}

const charts = readData("chart-data");
let drawn = [];
window.jaxembedViews = new Map(); // element -> view of its chart, for the console

let turn = 0;

async function drawCharts() {
  const own = ++turn; // a later change of the color scheme cancels this drawing
  drawn.forEach((result) => result.finalize());
  drawn = [];
  const scheme = darkScheme.matches ? "dark" : "light";
  const options = { actions: false, renderer: "canvas", config: makeTheme(), tooltip: { theme: scheme } };
  for (const element of document.querySelectorAll(".chart")) {
    const result = await window.vegaEmbed(element, charts[Number(element.dataset.chart)], options);
    if (own !== turn) return;
    const figure = element.closest("figure");
    result.view.addEventListener("click", (_, item) => pickPoint(figure, item));
    drawn.push(result);
    window.jaxembedViews.set(element, result.view);
  }
  document.documentElement.dataset.drawn = scheme;
}

function makeElement(tag, className, ...children) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  element.append(...children);
  return element;
}

function startBrowser(sets) {
  const [setChoice, note, list, panel] = ["set", "set-note", "queries", "documents"].map((id) => document.getElementById(id));
  const filters = [...document.querySelectorAll("[data-filter]")];
  let filter = "all";
  sets.forEach((set, index) => setChoice.append(new Option(set.label, String(index))));

  const isHit = (set, query) => query.rank <= set.hits;

  function showQuery(set, query, button) {
    list.querySelectorAll("button").forEach((other) => other.setAttribute("aria-current", String(other === button)));
    const cards = query.neighbors.map((neighbor) => {
      const score = makeElement("span", "quiet", `cosine ${neighbor.score.toFixed(3)}`);
      const mark = makeElement("span", "mark", neighbor.relevant ? "relevant" : "");
      const head = makeElement("div", "head", makeElement("span", "rank", String(neighbor.rank)), score, mark);
      const card = makeElement("li", neighbor.relevant ? "relevant" : "", head, makeElement("p", "", set.documents[neighbor.document]));
      card.addEventListener("click", () => card.classList.toggle("open"));
      return card;
    });
    panel.replaceChildren(makeElement("p", "asked", query.text), makeElement("ol", "", ...cards));
  }

  function showSet() {
    const set = sets[Number(setChoice.value)];
    const shown = set.queries.filter((query) => filter === "all" || isHit(set, query) === (filter === "hit"));
    const hits = set.queries.filter((query) => isHit(set, query)).length;
    note.textContent = `${set.note}; of the ${set.queries.length} listed queries, ${hits} are hits.`;
    const buttons = shown.map((query) => {
      const badge = makeElement("span", isHit(set, query) ? "badge hit" : "badge miss", String(query.rank));
      const button = makeElement("button", "", badge, makeElement("span", "asking", query.text));
      button.type = "button";
      button.addEventListener("click", () => {
        showQuery(set, query, button);
        if (matchMedia("(max-width: 760px)").matches) panel.scrollIntoView({ block: "nearest", behavior: "smooth" });
      });
      return button;
    });
    list.replaceChildren(...buttons.map((button) => makeElement("li", "", button)));
    panel.replaceChildren();
    if (shown.length) showQuery(set, shown[0], buttons[0]);
  }

  filters.forEach((button) =>
    button.addEventListener("click", () => {
      filter = button.dataset.filter;
      filters.forEach((other) => other.setAttribute("aria-pressed", String(other === button)));
      showSet();
    }),
  );
  setChoice.addEventListener("change", showSet);
  setChoice.closest("label").hidden = sets.length < 2;
  showSet();
}

const neighborSets = readData("neighbor-data");
if (neighborSets.length) startBrowser(neighborSets);
if (charts.length) {
  darkScheme.addEventListener("change", drawCharts);
  await drawCharts();
}
