// One map of weights at a time, chosen by layer and head; colours follow the square root of the weight.

/** The number or numbers that a cell stands for. */
function span(cell, step, count) {
  const first = cell * step;
  const last = Math.min(first + step, count) - 1;
  return first === last ? String(first) : `${first}\u2013${last}`;
}

function sayCell(drawing, layer, row, column, value) {
  const blocks = layer.row_step > 1 || layer.column_step > 1;
  const place = `${drawing.row} ${span(row, layer.row_step, layer.rows)}, ${drawing.column} ${span(column, layer.column_step, layer.columns)}`;
  return `${place}: ${blocks ? "at most " : ""}${shown(value)}`;
}

function heatMapOptions(drawing, layer, [head, weights]) {
  const rows = Math.ceil(layer.rows / layer.row_step);
  const columns = Math.ceil(layer.columns / layer.column_step);
  const largest = Math.max(...layer.heads.map(([, all]) => all.reduce((most, each) => Math.max(most, each), 0))) || 1;
  const cells = weights.flatMap((value, index) =>
    value === null ? [] : [[index % columns, Math.floor(index / columns), Math.sqrt(value), value]]);
  const axis = (name, count, step, whole) => ({
    type: "category",
    name,
    nameLocation: "middle",
    nameTextStyle: { color: colour("quiet"), fontSize: 12 },
    data: Array.from({ length: count }, (_, cell) => span(cell, step, whole)),
    axisLabel: { color: colour("quiet"), fontSize: 11, formatter: (text) => text.split("\u2013")[0] },
    axisLine: { show: false },
    axisTick: { show: false },
  });
  const description = `${drawing.title}: weights of ${layer.name}, ${head}. The numbers stand in the table that follows.`;
  return {
    animation: false,
    textStyle: { fontFamily: fontOf(document.body), color: colour("ink") },
    aria: { enabled: true, label: { description } },
    grid: { left: 8, right: 8, top: 8, bottom: 40, outerBoundsMode: "same", outerBoundsContain: "all" },
    xAxis: { ...axis(drawing.column, columns, layer.column_step, layer.columns), nameGap: 26 },
    yAxis: { ...axis(drawing.row, rows, layer.row_step, layer.rows), inverse: true, nameGap: 10 },
    visualMap: {
      type: "continuous",
      dimension: 2,
      min: 0,
      max: Math.sqrt(largest),
      orient: "horizontal",
      left: "center",
      bottom: 0,
      itemWidth: 12,
      itemHeight: 180,
      text: [shown(largest, 3), "0"],
      textStyle: { color: colour("quiet") },
      inRange: { color: MAP_COLOURS },
    },
    tooltip: {
      confine: true,
      transitionDuration: 0,
      backgroundColor: colour("surface"),
      borderColor: colour("line"),
      textStyle: { color: colour("ink"), fontSize: 13 },
      formatter: ({ value }) => element("div", "tip", sayCell(drawing, layer, value[1], value[0], value[3])),
    },
    series: [{ type: "heatmap", data: cells, emphasis: { itemStyle: { borderColor: colour("ink"), borderWidth: 1 } } }],
  };
}

/** As high as the cells are square, within reason. */
function heatMapHeight(layer, width) {
  const rows = Math.ceil(layer.rows / layer.row_step);
  const columns = Math.ceil(layer.columns / layer.column_step);
  return Math.round(Math.min(640, Math.max(120, ((width - 60) * rows) / columns)) + 100);
}

function fillMapTable(box, drawing, layer, [, weights]) {
  const columns = Math.ceil(layer.columns / layer.column_step);
  const rows = Math.ceil(layer.rows / layer.row_step);
  const heading = (text, scope) => {
    const made = element("th", "", text);
    made.scope = scope;
    return made;
  };
  const numbers = Array.from({ length: columns }, (_, cell) => heading(span(cell, layer.column_step, layer.columns), "col"));
  const head = element("thead", "", element("tr", "", element("th", "", `${drawing.row} \\ ${drawing.column}`), ...numbers));
  const lines = Array.from({ length: rows }, (_, row) => {
    const cells = weights.slice(row * columns, (row + 1) * columns).map((value) => element("td", "number", shown(value, 3)));
    return element("tr", "", heading(span(row, layer.row_step, layer.rows), "row"), ...cells);
  });
  box.replaceChildren(element("table", "", head, element("tbody", "", ...lines)));
}
