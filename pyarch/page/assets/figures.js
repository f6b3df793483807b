// Charts and heat maps in their figures. `prepare` makes the room for a width and fills what stands around the
// drawing, so that nothing moves when `show` draws it later; the width last prepared is kept.

const OPTIONS = { bars: barOptions, scatter: scatterOptions, lines: lineOptions };

function chartFigure(figure, drawing) {
  const place = figure.querySelector(".drawing");
  const hidden = new Set();
  let whole = false;
  let chart = null;
  let size = null;
  let options = null;
  const prepare = (width = size.width) => {
    size = { width, height: drawing.kind === "bars" ? barHeight(drawing, width, whole) : Math.max(300, Math.min(440, width * 0.6)) };
    options = OPTIONS[drawing.kind](drawing, width, whole);
    place.style.height = `${size.height}px`;
    const toggle = (name) => chart?.dispatchAction({ type: "legendToggleSelect", name });
    fillLegend(figure.querySelector(".legend"), options, hidden, toggle);
  };
  const show = () => {
    chart ??= echarts.init(place, null, { renderer: "svg", ...size });
    options.legend.selected = Object.fromEntries(Array.from(hidden, (name) => [name, false]));
    chart.resize(size);
    chart.setOption(options, { notMerge: true });
  };
  if (drawing.kind === "bars" && drawing.names.length > MOST_GROUPS) {
    const more = element("button", "more", `Show all ${drawing.names.length}`);
    more.type = "button";
    more.addEventListener("click", () => {
      whole = !whole;
      more.textContent = whole ? `Show the first ${MOST_GROUPS}` : `Show all ${drawing.names.length}`;
      prepare();
      show();
    });
    figure.append(more);
  }
  return { place, prepare, show, isDrawn: () => chart !== null };
}

/** A heat map with its choosers and its table of numbers. */
function heatMapFigure(figure, drawing) {
  const place = figure.querySelector(".drawing");
  const [layers, heads] = [figure.querySelector(".layer"), figure.querySelector(".head")];
  const details = figure.parentElement.querySelector(".map-data");
  let chart = null;
  let size = null;
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
  const prepare = (width = size.width) => {
    size = { width, height: heatMapHeight(layer(), width) };
    place.style.height = `${size.height}px`;
    const { name, rows, columns, row_step, column_step } = layer();
    const blocks = row_step > 1 || column_step > 1 ? `, a cell is the largest of ${row_step} by ${column_step}` : "";
    figure.querySelector("figcaption").textContent = `${name}, ${head()[0]}: ${rows} by ${columns} weights${blocks}.`;
  };
  const show = () => {
    chart ??= echarts.init(place, null, { renderer: "canvas", ...size });
    chart.resize(size);
    chart.setOption(heatMapOptions(drawing, layer(), head()), { notMerge: true });
  };
  const change = () => {
    prepare();
    show();
    fillTable();
  };
  layers.addEventListener("change", () => {
    fillHeads();
    change();
  });
  heads.addEventListener("change", change);
  details.addEventListener("toggle", fillTable);
  fillHeads();
  return { place, prepare, show, isDrawn: () => chart !== null };
}
