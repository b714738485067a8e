// Light and dark, and colours of heatmaps, which are held against chance.

// ---- Themes ------------------------------------------------------------------------------------------------------------

const FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif";
const THEMES = {
  light: {
    text: "#3c444d", grid: "#e3e6ea", ink: "#14181c", halo: "#ffffff", accent: "#c8500a", quiet: "#8a939c",
    diverging: ["#1f4e9c", "#5a8fd0", "#b4cfea", "#f5f4f2", "#f3c69a", "#d98032", "#8f4a06"],
    series: ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#5b6570", "#a39200"],
  },
  dark: {
    text: "#c3cad2", grid: "#2e353d", ink: "#ffffff", halo: "#14181c", accent: "#ff9a4d", quiet: "#7d8894",
    diverging: ["#9cc8ff", "#5a93dc", "#2f5384", "#23282e", "#7a4a20", "#d58436", "#ffc285"],
    series: ["#56b4e9", "#ff8a3d", "#2fc79a", "#e59ac4", "#f0e442", "#e69f00", "#b8c0c8", "#8f9fff"],
  },
};
const prefersDark = matchMedia("(prefers-color-scheme: dark)");
const prints = matchMedia("print"); // on white, whatever the screen shows
const themeName = () => (prints.matches ? "light" : state.theme in THEMES ? state.theme : prefersDark.matches ? "dark" : "light");
const theme = () => THEMES[themeName()];

function vegaConfig() {
  const { text, grid, series } = theme();
  const words = { labelColor: text, titleColor: text, labelFont: FONT, titleFont: FONT, titleFontWeight: 500, labelFontSize: 11, titleFontSize: 11 };
  return {
    axis: { ...words, gridColor: grid, domainColor: grid, tickColor: grid, titlePadding: 6 },
    legend: { ...words, labelFontSize: 11, symbolSize: 90 },
    style: { cell: { stroke: "transparent" } },
    range: { category: series },
  };
}

/** Give the parameters of a picture their values. */
function setSignals(spec, values) {
  for (const signal of spec.signals) if (signal.name in values) signal.value = values[signal.name];
}

/** A long name without its middle: names of checkpoints differ at their ends. */
function cut(name, most) {
  return name.length <= most ? name : `${name.slice(0, Math.ceil(most / 2) - 1)}…${name.slice(-Math.floor(most / 2))}`;
}

/** An axis of whole numbers names nothing between them. */
function whole(axis) {
  axis.encode = { ...axis.encode, labels: { update: { text: { signal: "datum.value % 1 ? '' : format(datum.value, 'd')" } } } };
}

// ---- Colours of heatmaps -----------------------------------------------------------------------------------------------

/** `marks` are the values that the bar names, and what it calls them. */
function setColours(spec, { type = "linear", domain, scheme, marks }) {
  spec.scales.find((each) => each.name === "color").type = type;
  setSignals(spec, { domain, scheme, marks: marks?.map((mark) => [mark[0], markText(mark)]) });
}

const chanceOf = (name) => currentStack().chance[name];

/** A mark of a legend: what it is called, or else its value. */
const markText = ([value, name]) => name ?? show(Number(value.toPrecision(2)));

/** Marks of a legend that reaches equally far to both sides of a centre; the best by chance, where it is apart from the centre. */
function marksAround(centre, reach, best) {
  const chance = best > reach / 5 ? [[centre - best, "chance"], [centre + best, "chance"]] : [[centre, best ? "chance" : undefined]];
  return [[centre - reach], ...chance, [centre + reach]];
}

/** Colours of what may lie on either side of a centre: they reach so far that what chance gives is pale, and the bar marks it. */
function around(centre, largest, best = 0) {
  const reach = Math.max(largest, index.pale * best) || 1;
  return { domain: [centre - reach, centre + reach], scheme: theme().diverging, marks: marksAround(centre, reach, best) };
}

/** The same for what is 0 at least. */
function above({ mean }, largest, best) {
  const reach = Math.max(largest, Math.min(1, index.pale * (mean + best))) || 1;
  const between = reach > 4 * mean ? [[reach / 2]] : [];
  return { domain: [0, reach], scheme: "viridis", marks: [[mean, "chance"], ...between, ...(reach > 1.25 * mean ? [[reach]] : [])] };
}

/** Of pictures of lines: where the best of all heads lies by chance, and where the axis must begin and end. */
function chanceBand(name) {
  const { mean, best } = chanceOf(name) ?? {};
  if (mean === undefined) return expectedOf(name).map((value) => ({ name: "chance", low: value, high: value, from: value, to: value }));
  return [{ name: "chance", low: mean - best, high: mean + best, from: mean - index.pale * best, to: mean + index.pale * best }];
}

/** What chance gives of a column where only that is known, and only if it is the same in all layers. */
function expectedOf(name) {
  const data = stacks.get(JSON.stringify(inStack()));
  const found = new Set(data?.layers.map((layer) => data.expected(name, layer)).filter((value) => value !== undefined));
  return found.size === 1 ? [...found] : [];
}

/** What chance gives of a column of heads in a layer, in words. */
function byChance(name, layer) {
  const expected = stacks.get(JSON.stringify(inStack()))?.expected(name, layer);
  return expected === undefined ? [] : [`by chance ${show(expected)}`];
}

/** A value against chance, in words. */
function againstChance(name, value, layer, ofMean = false) {
  const { mean, deviation } = chanceOf(name) ?? {};
  if (!deviation) return index.columns.some((column) => column.name === name) ? byChance(name, layer) : [];
  if (["right", "left", "signed"].includes(name)) return [`${show(Number((value / mean).toPrecision(3)))} × chance`];
  const unit = ofMean ? deviation / Math.sqrt(currentStack().heads) : deviation;
  return [`${show(Number(((value - mean) / unit).toPrecision(2)))} deviations from chance`];
}

function columnColours(data) {
  const { name, centre } = index.columns.find((column) => column.name === state.column);
  const values = data.column(name);
  if (centre !== null) {
    const middle = chanceOf(name)?.mean ?? centre;
    return around(middle, quantile(values.map((value) => Math.abs(value - middle)), 0.99), chanceOf(name)?.best);
  }
  const [chance] = expectedOf(name);
  const reached = (...shares) => [...shares.map((share) => quantile(values, share)), ...(chance === undefined ? [] : [chance])];
  const [all, most] = [reached(0, 1), reached(0.01, 0.99)].map((found) => [Math.min(...found), Math.max(...found)]);
  const type = spansDecades(...all) ? "log" : "linear";
  const [low, high] = type === "log" ? all : most[0] < most[1] ? most : [all[0], all[0] + 1];
  const share = (value) => (type === "log" ? Math.log(value / low) / Math.log(high / low) : (value - low) / (high - low));
  const ends = [low, high].filter((end) => Math.abs(share(end) - share(chance)) > 0.2).map((end) => [end]);
  return { type, domain: [low, high], scheme: "viridis", marks: chance === undefined ? undefined : [[chance, "chance"], ...ends] };
}
