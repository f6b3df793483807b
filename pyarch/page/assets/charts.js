// Bars, points and lines: from a drawing (see charts.py) to the options of ECharts.

const SYMBOLS = ["circle", "rect", "triangle", "diamond"];
const DASHES = ["solid", "dashed", "dotted"];
const MOST_GROUPS = 30; // of bars that are shown at first
const BAR = 13;
const NARROW = 560; // pixels; names stand above their bars where there are fewer
const NAME_HEIGHT = 18;
const NAME_SIZE = 12;
const MARK_HEIGHT = 10; // above the bars, for what the mark says
const X_NAME_GAP = 28;
const Y_NAME_GAP = 14;

/** What all charts share. */
function frame(drawing, tooltip) {
  return {
    animation: false,
    textStyle: { fontFamily: fontOf(document.body), color: colour("ink") },
    aria: { enabled: true, label: { description: describe(drawing) } },
    legend: { show: false },
    grid: { left: 8, right: 24, top: 12 + markRoom(drawing), bottom: 8, outerBoundsMode: "same", outerBoundsContain: "all" },
    tooltip: {
      confine: true,
      transitionDuration: 0,
      backgroundColor: colour("surface"),
      borderColor: colour("line"),
      textStyle: { color: colour("ink"), fontSize: 13 },
      ...tooltip,
    },
  };
}

function describe(drawing) {
  const names = drawing.series.map(([name]) => name).join(", ");
  const marked = hasMark(drawing) ? `, with a line at ${withUnit(drawing.mark, drawing.axis)}` : "";
  const what = drawing.kind === "bars" ? drawing.axis.label : `${drawing.y.label} over ${drawing.x.label}`;
  return `${drawing.title}: ${drawing.kind} of ${what} for ${names}${marked}. The numbers stand in the table that follows.`;
}

function hasMark(drawing) {
  return drawing.kind === "bars" && drawing.mark !== null;
}

function fontOf(place) {
  return getComputedStyle(place).fontFamily;
}

/** Where a logarithmic axis of these positive values begins and ends, and the base of its steps. */
function logRange(values) {
  if (!values.length) return { logBase: 10 };
  const [least, most] = [Math.min(...values), Math.max(...values)];
  if (values.every((value) => Number.isInteger(Math.log2(value)))) return { logBase: 2 };
  const round = (value, way) => {
    const power = 10 ** Math.floor(Math.log10(value));
    const steps = [1, 2, 5, 10].map((step) => step * power);
    return way < 0 ? steps.findLast((step) => step <= value) : steps.find((step) => step >= value);
  };
  return { logBase: 10, min: round(least * 0.98, -1), max: round(most * 1.02, 1) };
}

/** An axis of values. `inside` are all values on it. */
function valueAxis(axis, inside, more) {
  return {
    type: axis.log ? "log" : "value",
    ...(axis.log ? logRange(inside.filter((value) => value > 0)) : {}),
    name: axis.label,
    nameLocation: "middle",
    nameTextStyle: { color: colour("quiet"), fontSize: 12 },
    axisLabel: { color: colour("quiet"), fontSize: 12, hideOverlap: true, formatter: (value) => shown(value, 3) },
    axisLine: { show: false },
    axisTick: { show: false },
    splitLine: { lineStyle: { color: colour("line") } },
    ...more,
  };
}

/** A logarithmic axis has no place for zero and less: what cannot be placed is not drawn. */
function placed(value, axis) {
  return axis.log && value !== null && value <= 0 ? null : value;
}

function barOptions(drawing, width, whole) {
  const count = whole ? drawing.names.length : Math.min(MOST_GROUPS, drawing.names.length);
  const names = drawing.names.slice(0, count);
  const colours = seriesColours(drawing.series.map(([name]) => name));
  const above = width < NARROW;
  const room = above ? width - 40 : width * 0.38;
  const font = `${NAME_SIZE}px ${fontOf(document.body)}`;
  const stack = drawing.series.length * (BAR + 2);
  const values = drawing.series.flatMap(([, each]) => each.slice(0, count)).concat(drawing.mark).filter((value) => value !== null);
  const tip = (points) =>
    element("div", "tip", element("strong", "", drawing.names[points[0].dataIndex]), ...drawing.series.map(([name, each]) =>
      element("div", "", element("span", "", name), element("span", "", withUnit(each[points[0].dataIndex], drawing.axis)))));
  return {
    ...frame(drawing, { trigger: "axis", axisPointer: { type: "shadow", shadowStyle: { color: colour("line"), opacity: 0.35 } }, formatter: tip }),
    xAxis: { ...valueAxis(drawing.axis, values, { nameGap: X_NAME_GAP }), ...barStart(drawing.axis, values) },
    yAxis: {
      type: "category",
      inverse: true,
      data: names,
      axisLabel: {
        color: colour("ink"),
        fontSize: NAME_SIZE,
        interval: 0,
        formatter: (name) => shortened(name, room, font),
        ...(above ? { inside: true, margin: 0, align: "left", verticalAlign: "bottom", padding: [0, 0, stack / 2 + 3, 0] } : {}),
      },
      z: 3,
      axisLine: { lineStyle: { color: colour("line") } },
      axisTick: { show: false },
    },
    series: drawing.series.map(([name, each], number) => ({
      type: "bar",
      name,
      color: colours[number].colour,
      data: each.slice(0, count).map((value) => placed(value, drawing.axis)),
      barMaxWidth: BAR,
      barGap: "15%",
      label: { show: true, position: "right", color: colour("quiet"), fontSize: 11, formatter: ({ value }) => shown(value, 3) },
      labelLayout: { hideOverlap: true },
      emphasis: { disabled: true },
    })).concat(hasMark(drawing) ? markSeries(drawing) : []),
  };
}

/** The line that bars are compared with. A series of its own, which no bar hides; its point widens the axis. */
function markSeries(drawing) {
  return {
    type: "scatter",
    data: [[drawing.mark, 0]],
    symbolSize: 0,
    silent: true,
    tooltip: { show: false },
    z: 4,
    markLine: {
      silent: true,
      symbol: "none",
      lineStyle: { color: colour("ink"), width: 1, type: "dashed" },
      label: { position: "start", formatter: withUnit(drawing.mark, drawing.axis), color: colour("ink"), fontSize: 11, distance: 3 },
      data: [{ xAxis: drawing.mark }],
    },
  };
}

function markRoom(drawing) {
  return hasMark(drawing) ? MARK_HEIGHT : 0;
}

function barHeight(drawing, width, whole) {
  const count = whole ? drawing.names.length : Math.min(MOST_GROUPS, drawing.names.length);
  return 70 + markRoom(drawing) + count * (drawing.series.length * (BAR + 2) + 12 + (width < NARROW ? NAME_HEIGHT : 0));
}

/** Bars on a logarithmic axis begin at its left end, which lies below the least value. */
function barStart(axis, values) {
  const positive = values.filter((value) => value > 0);
  if (!axis.log || !positive.length) return {};
  const start = 10 ** (Math.ceil(Math.log10(Math.min(...positive))) - 1);
  return { logBase: 10, min: start, startValue: start };
}

function scatterOptions(drawing) {
  const colours = seriesColours(drawing.series.map(([name]) => name));
  const corners = drawing.lines.flatMap(([, pairs]) => pairs);
  const points = drawing.series.flatMap(([, each]) => each);
  const on = (axis) => [...points, ...corners].map((each) => each[axis]).filter((value) => value !== null);
  const place = ([x, y, label]) => ({ value: [placed(x, drawing.x), placed(y, drawing.y)], name: label });
  const tip = ({ seriesName, name, value }) => pointTip(drawing, name || seriesName, name ? seriesName : "", value);
  return {
    ...frame(drawing, { trigger: "item", formatter: tip }),
    xAxis: valueAxis(drawing.x, on(0), { nameGap: X_NAME_GAP }),
    yAxis: valueAxis(drawing.y, on(1), { nameGap: Y_NAME_GAP }),
    series: [
      ...drawing.series.map(([name, each], number) => ({
        type: "scatter",
        name,
        color: colours[number].colour,
        symbol: SYMBOLS[number % SYMBOLS.length],
        symbolSize: 10,
        itemStyle: { opacity: 0.85, borderColor: colour("surface"), borderWidth: 1 },
        data: each.map(place),
      })),
      ...drawing.lines.map(([name, pairs], number) => ({
        type: "line",
        name,
        color: colour("quiet"),
        lineStyle: { width: 1.5, type: DASHES[number % DASHES.length] },
        showSymbol: false,
        z: 1,
        data: pairs.map(place),
      })),
    ],
  };
}

function pointTip(drawing, title, series, [x, y]) {
  const line = (name, text) => element("div", "", element("span", "", name), element("span", "", text));
  const lines = [line(drawing.x.label, shown(x)), line(drawing.y.label, shown(y))];
  return element("div", "tip", element("strong", "", title), ...(series ? [element("div", "", series)] : []), ...lines);
}

function lineOptions(drawing) {
  const colours = seriesColours(drawing.series.map(([name]) => name));
  const points = drawing.series.flatMap(([, pairs]) => pairs);
  const on = (axis) => points.map((pair) => pair[axis]).filter((value) => value !== null);
  const tip = (found) =>
    element("div", "tip", element("strong", "", `${drawing.x.label}: ${shown(found[0].value[0])}`), ...found.map(({ seriesName, value }) =>
      element("div", "", element("span", "", seriesName), element("span", "", withUnit(value[1], drawing.y)))));
  return {
    ...frame(drawing, { trigger: "axis", axisPointer: { lineStyle: { color: colour("quiet") }, label: { show: false } }, formatter: tip }),
    xAxis: valueAxis(drawing.x, on(0), { nameGap: X_NAME_GAP, ...(drawing.x.log ? {} : { min: "dataMin", max: "dataMax" }) }),
    yAxis: valueAxis(drawing.y, on(1), { nameGap: Y_NAME_GAP }),
    series: drawing.series.map(([name, pairs], number) => ({
      type: "line",
      name,
      color: colours[number].colour,
      symbol: SYMBOLS[number % SYMBOLS.length],
      symbolSize: 8,
      showAllSymbol: true,
      lineStyle: { width: 2, type: DASHES[colours[number].turn % DASHES.length] },
      data: pairs.map(([x, y]) => [placed(x, drawing.x), placed(y, drawing.y)]),
    })),
  };
}

/** The buttons above a chart that show and hide its series, each with the mark of its series. */
function fillLegend(legend, options, hidden, toggle) {
  const buttons = options.series.filter((series) => "name" in series).map((series) => {
    const button = element("button", "", mark(series), element("span", "", series.name));
    button.type = "button";
    button.setAttribute("aria-pressed", String(!hidden.has(series.name)));
    button.addEventListener("click", () => {
      if (!hidden.delete(series.name)) hidden.add(series.name);
      button.setAttribute("aria-pressed", String(!hidden.has(series.name)));
      toggle(series.name);
    });
    return button;
  });
  legend.replaceChildren(...buttons);
}

const MARKS = {
  circle: "M12 2a4 4 0 1 0 0 8a4 4 0 1 0 0-8z",
  rect: "M8 2h8v8h-8z",
  triangle: "M12 1l5 9h-10z",
  diamond: "M12 0l5 6l-5 6l-5-6z",
};

/** A small picture of how a series is drawn. */
function mark(series) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("viewBox", "0 0 24 12");
  svg.setAttribute("aria-hidden", "true");
  const add = (attributes) => {
    const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
    for (const [name, value] of Object.entries(attributes)) path.setAttribute(name, value);
    svg.append(path);
  };
  const dashes = { dashed: "5 3", dotted: "2 2", solid: "none" };
  if (series.type === "line") add({ d: "M0 6h24", stroke: series.color, "stroke-width": 2, "stroke-dasharray": dashes[series.lineStyle.type] });
  if (series.type === "bar") add({ d: "M4 1h16v10h-16z", fill: series.color });
  else if (series.symbol) add({ d: MARKS[series.symbol], fill: series.color });
  return svg;
}
