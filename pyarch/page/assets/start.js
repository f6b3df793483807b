// Brings the page to life: every drawing drawn, redrawn when its width or the theme changes, and for print.

const PRINTED_WIDTH = 680;
const OPTIONS = { bars: barOptions, scatter: scatterOptions, lines: lineOptions };

/** Start the chart in a figure; returns the function that draws it anew, for a width where one is given. */
function startChart(figure, drawing) {
  const place = figure.querySelector(".drawing");
  const hidden = new Set();
  let whole = false;
  const chart = echarts.init(place, null, { renderer: "svg", width: 100, height: 100 });
  const draw = (width = place.clientWidth) => {
    const height = drawing.kind === "bars" ? barHeight(drawing, width, whole) : Math.max(300, Math.min(440, width * 0.6));
    const options = OPTIONS[drawing.kind](drawing, width, whole);
    options.legend.selected = Object.fromEntries(Array.from(hidden, (name) => [name, false]));
    chart.resize({ width, height });
    chart.setOption(options, { notMerge: true });
    fillLegend(figure.querySelector(".legend"), chart, options, hidden);
  };
  if (drawing.kind === "bars" && drawing.names.length > MOST_GROUPS) {
    const more = element("button", "more", `Show all ${drawing.names.length}`);
    more.type = "button";
    more.addEventListener("click", () => {
      whole = !whole;
      more.textContent = whole ? `Show the first ${MOST_GROUPS}` : `Show all ${drawing.names.length}`;
      draw();
    });
    figure.append(more);
  }
  return draw;
}

/** Start the choosers and the map of a figure; returns the function that draws it anew. */
function startHeatMap(figure, drawing) {
  const place = figure.querySelector(".drawing");
  const [layers, heads] = [figure.querySelector(".layer"), figure.querySelector(".head")];
  const details = figure.parentElement.querySelector(".map-data");
  const chart = echarts.init(place, null, { renderer: "canvas", width: 100, height: 100 });
  const layer = () => drawing.layers[layers.selectedIndex];
  const head = () => layer().heads[heads.selectedIndex];
  const fillHeads = () => {
    const kept = heads.value;
    heads.replaceChildren(...layer().heads.map(([name]) => element("option", "", name)));
    if (layer().heads.some(([name]) => name === kept)) heads.value = kept;
  };
  const fillTable = () => {
    if (details.open) fillMapTable(details.querySelector(".box"), drawing, layer(), head());
  };
  const draw = (width = place.clientWidth) => {
    chart.resize({ width, height: heatMapHeight(layer(), width) });
    chart.setOption(heatMapOptions(drawing, layer(), head()), { notMerge: true });
    const { name, rows, columns, row_step, column_step } = layer();
    const blocks = row_step > 1 || column_step > 1 ? `, a cell is the largest of ${row_step} by ${column_step}` : "";
    figure.querySelector("figcaption").textContent = `${name}, ${head()[0]}: ${rows} by ${columns} weights${blocks}.`;
    fillTable();
  };
  layers.addEventListener("change", () => {
    fillHeads();
    draw();
  });
  heads.addEventListener("change", () => draw());
  details.addEventListener("toggle", fillTable);
  fillHeads();
  return draw;
}

const drawings = JSON.parse(document.getElementById("drawings").textContent);
const drawn = Array.from(document.querySelectorAll("[data-drawing]"), (figure) => {
  const drawing = drawings[figure.dataset.drawing];
  const draw = drawing.kind === "heat maps" ? startHeatMap(figure, drawing) : startChart(figure, drawing);
  return { place: figure.querySelector(".drawing"), draw, width: null };
});

startTheme(() => drawn.forEach(({ draw }) => draw()));
document.querySelectorAll(".sheet").forEach(startSheet);

const watcher = new ResizeObserver((entries) => {
  for (const { target, contentRect } of entries) {
    const each = drawn.find(({ place }) => place === target);
    // The first report comes with the start, where all is drawn already; a window of no width shows nothing.
    if (contentRect.width === 0 || contentRect.width === each.width) continue;
    if (each.width !== null) each.draw();
    each.width = contentRect.width;
  }
});
drawn.forEach(({ place }) => watcher.observe(place));

// Paper is white and narrower than the screen.
addEventListener("beforeprint", () => {
  const root = document.documentElement;
  root.dataset.screen = root.dataset.theme ?? "";
  root.dataset.theme = "light";
  drawn.forEach(({ draw }) => draw(PRINTED_WIDTH));
});
addEventListener("afterprint", () => {
  const root = document.documentElement;
  if (root.dataset.screen) root.dataset.theme = root.dataset.screen;
  else delete root.dataset.theme;
  drawn.forEach(({ draw }) => draw());
});
