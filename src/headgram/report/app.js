// The page: what is chosen (the state, kept in the address), the models' arrays, and pictures that follow from both.

const element = (id) => document.getElementById(id);

// ---- Packs: see pack.py ------------------------------------------------------------------------------------------------

async function unpack(text) {
  const compressed = Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
  const stream = new Blob([compressed]).stream().pipeThrough(new DecompressionStream("gzip"));
  const bytes = new Uint8Array(await new Response(stream).arrayBuffer());
  const length = new DataView(bytes.buffer).getUint32(0, true);
  const header = JSON.parse(new TextDecoder().decode(bytes.subarray(4, 4 + length)));
  const planes = bytes.subarray(4 + length);
  const count = planes.length / 4;
  const numbers = new Uint8Array(planes.length);
  for (let plane = 0; plane < 4; plane++) {
    for (let i = 0; i < count; i++) numbers[4 * i + plane] = planes[plane * count + i];
  }
  const floats = new Float32Array(numbers.buffer);
  const arrays = {};
  let start = 0;
  for (const [name, shape] of header.arrays) {
    const size = shape.reduce((product, each) => product * each, 1);
    arrays[name] = { shape, data: floats.subarray(start, start + size) };
    start += size;
  }
  return { meta: header.meta, arrays };
}

const models = new Map(); // name -> promise of its arrays
const awaited = new Map(); // name -> what a script beside the page calls when it has loaded

function loadModel(name) {
  if (!models.has(name)) {
    const embedded = element(`pack-${name}`);
    const text = embedded ? Promise.resolve(embedded.textContent) : loadBeside(name);
    const loading = text.then(unpack).then((found) => found.arrays);
    loading.catch(() => models.delete(name));
    models.set(name, loading);
  }
  return models.get(name);
}

function loadBeside(name) {
  return new Promise((resolve, reject) => {
    awaited.set(name, resolve);
    const script = document.createElement("script");
    script.src = `data/${name.split("/").map(encodeURIComponent).join("/")}.js`;
    script.onerror = () => reject(new Error(`The data of ${name} are not there: they lie beside this page, in data/${name}.js.`));
    document.head.append(script);
  });
}

// ---- The state ---------------------------------------------------------------------------------------------------------

const SELECTS = ["side", "measure", "scale", "depth", "pairs", "order", "kind"]; // whose options do not depend on the model
const COMPARED = 8; // as many models as there are colours
const state = {};
let index; // columns, models, stacks; the quartiles of all models
let quartiles;

const stackOf = (model, stack) => index.models[model][stack] ?? Object.values(index.models[model])[0];
const circuitOf = (stack) => (stack.includes("/") ? stack.split("/")[0] : ""); // stacks are called `{circuit}/{stack}`
const currentStack = () => stackOf(state.model, state.stack);

/** Take over what is wished for, as far as it exists; the rest falls back to what comes first. */
function choose(wish) {
  const among = (values, ...wishes) => wishes.find((each) => values.includes(each)) ?? values[0];
  if (wish.circuit && !wish.stack) wish = { ...wish, stack: `${wish.circuit}/${state.stack?.split("/").at(-1)}` };
  Object.assign(state, wish);
  const names = Object.keys(index.models);
  state.model = among(names, state.model);
  state.stack = among(Object.keys(index.models[state.model]), state.stack);
  state.circuit = circuitOf(state.stack);
  const stack = currentStack();
  state.layer = among(stack.layer_indices, Number(state.layer));
  state.head = Math.min(Math.max(Math.trunc(Number(state.head)) || 0, 0), stack.heads - 1);
  state.column = among(index.columns.map((column) => column.name), state.column);
  state.form = among(Object.keys(index.forms), state.form);
  for (const id of SELECTS) {
    state[id] = among([...element(id).options].map((option) => option.value), state[id]);
  }
  const known = (layer, head = 0) => stack.layer_indices.includes(Number(layer)) && Number(head) < stack.heads;
  state.zoom = /^\d+-\d+$/.test(state.zoom) && state.zoom.split("-").every((layer) => known(layer)) ? state.zoom : "";
  state.other = /^\d+\.\d+$/.test(state.other) && known(...state.other.split(".")) ? state.other : "";
  state.with = (state.with ?? names.slice(0, 4)).filter((name) => names.includes(name));
  state.with = state.with.slice(0, COMPARED - (state.with.includes(state.model) ? 0 : 1));
}

function readAddress() {
  const wish = Object.fromEntries(new URLSearchParams(location.hash.slice(1)));
  if (wish.with !== undefined) wish.with = wish.with.split(",");
  return wish;
}

let replaces = true; // whether the next address takes the place of this one in the browser's history, or follows it

function writeAddress() {
  const { with: others, ...rest } = state;
  const address = new URLSearchParams(Object.entries(rest).filter(([, value]) => value !== undefined));
  address.set("with", others.join(","));
  if (`#${address}` !== location.hash) history[replaces ? "replaceState" : "pushState"](null, "", `#${address}`);
  replaces = false;
}

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

// ---- Numbers -----------------------------------------------------------------------------------------------------------

const labelled = new Intl.NumberFormat("en", { maximumSignificantDigits: 4, useGrouping: false });
const scientific = (value) => value.toExponential(2).replace("e+", "e");

function show(value) {
  const size = Math.abs(value);
  return (size !== 0 && (size < 1e-3 || size >= 1e6) ? scientific(value) : labelled.format(value)).replace("-", "−");
}

function quantile(values, share) {
  const sorted = Float32Array.from(values).sort();
  return sorted.length ? sorted[Math.min(sorted.length - 1, Math.floor(share * sorted.length))] : 0;
}

/** What the pictures read of the chosen stack; everything derived is computed once. */
class StackData {
  constructor(arrays, name, meta) {
    this.at = (part) => arrays[`${name}/${part}`];
    this.feeding = (part) => arrays[`qk/${name.split("/").at(-1)}/feeding/${part}`]; // of both circuits
    this.meta = meta;
    this.layers = meta.layer_indices;
    this.memory = new Map();
  }

  once(key, compute) {
    if (!this.memory.has(key)) this.memory.set(key, compute());
    return this.memory.get(key);
  }

  /** One column of all heads, layer by layer. */
  column(name) {
    const { shape, data } = this.at("heads");
    const size = shape[1] * shape[2];
    const place = index.columns.findIndex((column) => column.name === name);
    return data.subarray(place * size, (place + 1) * size);
  }

  position(layer) {
    return this.layers.indexOf(layer);
  }

  headValue(name, layer, head) {
    return this.column(name)[this.position(layer) * this.meta.heads + head];
  }

  /** The share of the stack's heads whose value is not above this one's. */
  standing(name, value) {
    const sorted = this.once(`sorted ${name}`, () => Float32Array.from(this.column(name)).sort());
    return sorted.filter((each) => each <= value).length / sorted.length;
  }

  /** Cells of a square of layers, of one head or of the mean over heads (head undefined). */
  square(kind, head) {
    const values = head === undefined ? this.mean(kind) : this.at(`pairs/${kind}`).data;
    const [step, offset] = head === undefined ? [1, 0] : [this.meta.heads, head];
    const count = this.layers.length;
    const cells = [];
    for (let a = 0; a < count; a++) {
      for (let b = 0; b < count; b++) {
        const [i, j] = a <= b ? [a, b] : [b, a];
        const pair = i * count - (i * (i - 1)) / 2 + (j - i);
        cells.push({ layer_a: this.layers[a], layer_b: this.layers[b], value: values[pair * step + offset] });
      }
    }
    return cells;
  }

  mean(kind) {
    return this.once(`mean ${kind}`, () => {
      const { shape: [pairs, heads], data } = this.at(`pairs/${kind}`);
      return Float32Array.from({ length: pairs }, (_, pair) => {
        let sum = 0;
        for (let head = 0; head < heads; head++) sum += data[pair * heads + head];
        return sum / heads;
      });
    });
  }

  /** How far the colours of a square reach: nearly the largest magnitude off the diagonal, over all heads alike. */
  reach(kind, mean) {
    return this.once(`reach ${kind} ${mean}`, () => {
      const count = this.layers.length;
      const values = mean ? this.mean(kind) : this.at(`pairs/${kind}`).data;
      const heads = mean ? 1 : this.meta.heads;
      const found = [];
      for (let a = 0, pair = 0; a < count; a++) {
        for (let b = a; b < count; b++, pair++) {
          if (b > a) for (let head = 0; head < heads; head++) found.push(Math.abs(values[pair * heads + head]));
        }
      }
      return quantile(found, 0.998) || 1;
    });
  }

  /** Rows of a spectrum: of all heads of a layer but one, or of that one. */
  lines(part, layer, head, chosen) {
    const { shape: [, heads, length], data } = this.at(part);
    const start = this.position(layer) * heads;
    const wanted = chosen ? [head] : [...Array(heads).keys()].filter((each) => each !== head);
    return wanted.flatMap((each) =>
      Array.from({ length }, (_, i) => ({ head: each, index: i, value: data[(start + each) * length + i] })));
  }

  /** The largest magnitude in the spectra of a layer. */
  largest(part, layer) {
    const { shape: [, heads, length], data } = this.at(part);
    const start = this.position(layer) * heads * length;
    return data.subarray(start, start + heads * length).reduce((most, value) => Math.max(most, Math.abs(value)), 0);
  }

  neighbours(measure, layer, head) {
    const found = this.at(`neighbours/${measure}`);
    if (!found) return [];
    const { shape: [, layers, heads, count], data } = found;
    const size = layers * heads * count;
    const start = (this.position(layer) * heads + head) * count;
    return Array.from({ length: count }, (_, i) =>
      ({ layer: data[start + i], head: data[size + start + i], value: data[2 * size + start + i] }));
  }
}

// ---- Colours of heatmaps -----------------------------------------------------------------------------------------------

/** `marks` are the values that the bar names, and what it calls them. */
function setColours(spec, { type = "linear", domain, range, marks }) {
  const scale = spec.scales.find((each) => each.name === "color");
  Object.assign(scale, { type, domain, range: { scheme: range } });
  delete scale.interpolate;
  const largest = Math.max(...domain.map(Math.abs));
  spec.legends[0].format = largest >= 1e3 ? "~s" : largest < 1e-3 ? "~e" : "~g";
  if (!marks) return;
  const [values, names] = [marks.map(([value]) => value), marks.map(([value, name]) => name ?? show(Number(value.toPrecision(2))))];
  const text = { signal: `${JSON.stringify(names)}[indexof(${JSON.stringify(values)}, datum.value)]` };
  Object.assign(spec.legends[0], { values, encode: { labels: { update: { text } } } });
}

const chanceOf = (name) => currentStack().chance[name];

/** Colours of what may lie on either side of a centre: they reach so far that what chance gives is pale, and the bar marks it. */
function around(centre, largest, best = 0) {
  const reach = Math.max(largest, index.pale * best) || 1;
  const chance = best > reach / 5 ? [[centre - best, "chance"], [centre + best, "chance"]] : [[centre, best ? "chance" : undefined]];
  return { domain: [centre - reach, centre + reach], range: theme().diverging, marks: [[centre - reach], ...chance, [centre + reach]] };
}

/** The same for what is 0 at least. */
function above({ mean }, largest, best) {
  const reach = Math.max(largest, Math.min(1, index.pale * (mean + best))) || 1;
  const between = reach > 4 * mean ? [[reach / 2]] : [];
  return { domain: [0, reach], range: "viridis", marks: [[mean, "chance"], ...between, [reach]] };
}

/** A value against chance, in words. */
function againstChance(name, value, ofMean = false) {
  const { mean, deviation } = chanceOf(name) ?? {};
  if (!deviation) return [];
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
  const [low, high] = [quantile(values, 0), quantile(values, 1)];
  if (spansDecades(low, high)) return { type: "log", domain: [low, high], range: "viridis" };
  const [first, last] = [quantile(values, 0.01), quantile(values, 0.99)];
  return { domain: first < last ? [first, last] : [low, low + 1], range: "viridis" };
}

// ---- Pictures ----------------------------------------------------------------------------------------------------------

/**
 * A picture: a Vega specification whose datasets follow from the state.
 *
 * kind   what the specification itself depends on; when it changes, the view is made anew
 * adapt  changes to the specification
 * sets   by dataset: what its rows depend on, and the rows
 * label  what the picture shows, for those who do not see it
 * tip    lines about a row, the first of them in bold
 * pick   what is chosen by a click on a row
 */
class Picture {
  constructor(id, spec, parts) {
    Object.assign(this, { id, spec, place: element(id), kindDrawn: null, drawn: {} }, parts);
    this.place.addEventListener("keydown", (event) => move(event, id));
    this.place.addEventListener("click", (event) => this.choose(event));
    this.place.addEventListener("pointermove", (event) => event.pointerType !== "touch" && this.point(event));
    this.place.addEventListener("pointerleave", (event) => event.pointerType !== "touch" && showTip(null, null));
    this.place.after(saveButtons(this));
  }

  /** A row's tip beside the pointer. */
  point(event) {
    const row = this.view && rowAt(this.view, this.place, event);
    this.place.style.cursor = row ? "pointer" : "";
    showTip(event, row && this.tip(row));
    return row;
  }

  /** A click or a tap. */
  choose(event) {
    const row = this.point(event);
    if (row) this.pick(row);
  }

  /** All rows that it draws, without what is only a frame. */
  rows() {
    const rows = Object.values(this.sets(this.data)).flatMap(([, make]) => make());
    return rows.filter((row) => row.value !== undefined || row.median !== undefined);
  }

  async draw(data) {
    this.data = data;
    await this.update(data);
    // Vega names the place anew whenever it makes a view.
    for (const [name, value] of Object.entries({ role: "application", "aria-roledescription": "picture", "aria-label": this.label(data) })) {
      this.place.setAttribute(name, value);
    }
  }

  async update(data) {
    const kind = JSON.stringify([themeName(), this.kind?.(data)]);
    const sets = Object.entries(this.sets(data)).map(([name, [dependencies, rows]]) => [name, JSON.stringify(dependencies), rows]);
    if (kind !== this.kindDrawn) return this.make(kind, sets, data);
    const changed = sets.filter(([name, key]) => this.drawn[name] !== key);
    for (const [name, key, rows] of changed) {
      this.drawn[name] = key;
      this.view.data(name, rows());
    }
    return changed.length ? this.view.runAsync() : null;
  }

  async make(kind, sets, data) {
    this.embedded?.finalize();
    const spec = structuredClone(specs[this.spec]);
    this.adapt?.(spec, data);
    for (const [name, , rows] of sets) spec.data.find((each) => each.name === name).values = rows();
    for (const name of ["accent", "quiet", "ink", "halo"]) spec.signals.find((signal) => signal.name === name).value = theme()[name];
    this.embedded = await vegaEmbed(this.place, spec, {
      mode: "vega", renderer: "canvas", config: vegaConfig(), actions: false, defaultStyle: false,
      logLevel: 1, // errors: that a layer with one head has no others is no warning
    });
    this.view = this.embedded.view;
    Object.assign(this, { kindDrawn: kind, drawn: Object.fromEntries(sets.map(([name, key]) => [name, key])) });
  }
}

const inStack = () => [state.model, state.stack];
const inLayer = () => [...inStack(), state.layer];
const inHead = () => [...inLayer(), state.head];
const columnOf = (name) => index.columns.find((column) => column.name === name);
const option = (id) => element(id).selectedOptions[0].textContent;

const strip = {
  kind: () => [inStack(), state.column],
  adapt: (spec, data) => setColours(spec, columnColours(data)),
  sets: (data) => ({
    cells: [[inStack(), state.column], () => {
      const { heads } = data.meta;
      return Array.from(data.column(state.column), (value, i) => ({ layer: data.layers[Math.floor(i / heads)], head: i % heads, value }));
    }],
    chosen: [inHead(), () => [{ layer: state.layer, head: state.head }]],
  }),
  label: () => `All heads of ${state.model}, layer by head, coloured by ${columnOf(state.column).label}`,
  tip: (row) => [`Layer ${row.layer}, head ${row.head}`, `${columnOf(state.column).label}: ${show(row.value)}`,
    ...againstChance(state.column, row.value)],
  pick: (row) => row.head !== undefined && set({ layer: row.layer, head: row.head }),
};

function square(control, mean) {
  const kind = () => state[control];
  return {
    kind: () => [inStack(), kind()],
    adapt: (spec, data) => {
      const chance = chanceOf(kind());
      const [reach, best] = [data.reach(kind(), mean), mean ? chance.best_mean : chance.best];
      setColours(spec, control === "form" ? around(0, reach, best) : above(chance, reach, best));
    },
    sets: (data) => ({
      cells: [[mean ? inStack() : [...inStack(), state.head], kind()], () => data.square(kind(), mean ? undefined : state.head)],
      chosen: [inLayer(), () => [{ layer_a: state.layer }]],
    }),
    label: () => `${option(control)} between layers, ${mean ? "mean over heads" : `head ${state.head}`}`,
    tip: (row) => [
      `Layers ${row.layer_a} and ${row.layer_b}`,
      `${mean ? "mean over heads" : `head ${state.head}`}: ${show(row.value)}`,
      ...againstChance(kind(), row.value, mean),
    ],
    pick: (row) => row.layer_a !== undefined && set({ layer: row.layer_a }),
  };
}

function lines(part, name) {
  return {
    kind: (data) => [state.scale, state.scale === "linear" || inLayer()],
    adapt: (spec, data) => {
      if (state.scale === "linear") return;
      const largest = data.largest(part, state.layer) || 1;
      Object.assign(spec.scales.find((each) => each.name === "y"), { type: "symlog", constant: largest / 100, nice: false });
      const powers = [0, 1, 2].map((step) => 10 ** (Math.floor(Math.log10(largest)) - step));
      spec.axes.filter((axis) => axis.scale === "y").forEach((axis) => { axis.values = [0, ...powers, ...powers.map((power) => -power)]; });
    },
    sets: (data) => ({
      others: [inHead(), () => data.lines(part, state.layer, state.head, false)],
      chosen: [inHead(), () => data.lines(part, state.layer, state.head, true)],
    }),
    label: () => `${name} of head ${state.head} among the heads of layer ${state.layer}`,
    tip: (row) => [`Layer ${state.layer}, head ${row.head}`, `from ${show(row.value)}`],
    pick: (row) => row.head !== undefined && set({ head: row.head }),
  };
}

/** The chosen model and those it is compared with, in the manifest's order. */
const DASHES = [[1, 0], [6, 3], [2, 2], [8, 3, 2, 3]];

/** A model's colour and dash follow from its place in the manifest, whatever is chosen beside it. */
function looks(model) {
  const place = Object.keys(index.models).indexOf(model);
  const { series } = theme();
  return { colour: series[place % series.length], dash: DASHES[Math.floor(place / series.length) % DASHES.length] };
}

/** Of a compared model: the stack that is drawn, the chosen one where it has that, else its first; and what it is called. */
function seriesOf(model) {
  const stack = state.stack in index.models[model] ? state.stack : Object.keys(index.models[model])[0];
  return { stack, series: Object.keys(index.models[model]).length > 1 ? `${model}, ${stack}` : model };
}

const compared = () => Object.keys(index.models).filter((name) => name === state.model || state.with.includes(name));

function depthOf(stack, position) {
  const count = stack.layer_indices.length;
  return state.depth === "layer" ? stack.layer_indices[position] : count > 1 ? position / (count - 1) : 0;
}

function profileRows() {
  return compared().flatMap((model) => {
    const { stack: name, series } = seriesOf(model);
    const stack = index.models[model][name];
    const { shape: [, columns, layers], data: values } = quartiles[`${model}/${name}`];
    const column = index.columns.findIndex((each) => each.name === state.column);
    const [q25, median, q75] = [0, 1, 2].map((part) => (part * columns + column) * layers);
    return stack.layer_indices.map((layer, i) => ({
      series, model, layer, x: depthOf(stack, i), q25: values[q25 + i], median: values[median + i], q75: values[q75 + i],
    }));
  });
}

const spansDecades = (low, high) => low > 0 && high / low > 100;
const profileIsWide = () => {
  const rows = profileRows();
  return spansDecades(Math.min(...rows.map((row) => row.q25)), Math.max(...rows.map((row) => row.q75)));
};

const profile = {
  kind: () => [state.depth, profileIsWide(), compared(), state.stack, element("profile").clientWidth],
  adapt: (spec) => {
    const names = compared().map((model) => seriesOf(model).series);
    const longest = Math.max(...names.map((name) => name.length));
    const width = element("profile").clientWidth;
    for (const [scale, look] of [["color", "colour"], ["strokeDash", "dash"]]) {
      Object.assign(spec.scales.find((each) => each.name === scale), { domain: names, range: compared().map((model) => looks(model)[look]) });
    }
    for (const legend of spec.legends) {
      Object.assign(legend, { strokeDash: "strokeDash", columns: Math.max(1, Math.floor(width / (7 * longest + 40))), labelLimit: width - 50 });
    }
    if (profileIsWide()) Object.assign(spec.scales.find((each) => each.name === "y"), { type: "log", nice: false, zero: false });
    spec.axes.filter((axis) => axis.title === "depth").forEach((axis) => {
      axis.title = state.depth === "layer" ? "layer" : "relative depth";
      if (state.depth === "layer") Object.assign(axis, { tickMinStep: 1, format: "d", labelSeparation: 6 });
    });
  },
  sets: (data) => ({
    profile: [[state.model, state.stack, state.with, state.column, state.depth], profileRows],
    chosen: [[...inLayer(), state.depth], () => [{ x: depthOf(data.meta, data.position(state.layer)) }]],
  }),
  label: () => `${columnOf(state.column).label} along the depth of ${compared().join(", ")}: median and quartiles over heads`,
  tip: (row) => [`${row.series}, layer ${row.layer}`, `median ${show(row.median)}`, `quartiles ${show(row.q25)} to ${show(row.q75)}`],
  pick: (row) => row.layer !== undefined && set({ model: row.model, layer: row.layer }),
};

let pictures;
let specs;

function makePictures() {
  specs = JSON.parse(element("pictures").textContent);
  pictures = [
    new Picture("strip", "cells", strip),
    new Picture("form-head", "square", square("form", false)),
    new Picture("form-mean", "square", square("form", true)),
    new Picture("side-head", "square", square("side", false)),
    new Picture("side-mean", "square", square("side", true)),
    new Picture("singular", "spectrum", lines("singular", "Singular values")),
    new Picture("eigenvalues", "spectrum", lines("eigenvalues", "Signed eigenvalues")),
    new Picture("profile", "profile", profile),
    new Matrix("matrix"),
  ];
}

/** Text beside the pointer; written as text, never as markup. */
function showTip(event, content) {
  const tip = element("tip");
  tip.hidden = !content;
  if (!content) return;
  tip.replaceChildren(...content.map((line, i) => Object.assign(document.createElement(i ? "div" : "strong"), { textContent: line })));
  const { width, height } = tip.getBoundingClientRect();
  tip.style.left = `${Math.max(4, Math.min(event.clientX + 14, innerWidth - width - 8))}px`;
  tip.style.top = `${event.clientY + 16 + height > innerHeight ? event.clientY - height - 10 : event.clientY + 16}px`;
}

/** Arrow keys in a picture: layers up and down, heads left and right; along the depth, layers left and right. */
function move(event, id) {
  const steps = { ArrowUp: ["layer", -1], ArrowDown: ["layer", 1], ArrowLeft: ["head", -1], ArrowRight: ["head", 1] };
  const [what, step] = steps[event.key] ?? [];
  if (!what || event.altKey || event.ctrlKey || event.metaKey) return;
  event.preventDefault();
  replaces = event.repeat; // a key that is held is one step back
  const stack = currentStack();
  if (what === "layer" || id === "profile") {
    const position = stack.layer_indices.indexOf(state.layer) + step;
    if (position in stack.layer_indices) set({ layer: stack.layer_indices[position] });
  } else {
    set({ head: Math.min(Math.max(state.head + step, 0), stack.heads - 1) });
  }
}

// ---- Controls and tables -----------------------------------------------------------------------------------------------

function fill(id, entries) {
  const select = element(id);
  const key = JSON.stringify(entries);
  if (select.dataset.entries !== key) {
    select.dataset.entries = key;
    select.replaceChildren(...entries.map(([value, text]) => new Option(text, value)));
  }
  select.value = state[id];
}

/** Whether a model's name holds every word of the filter. */
const isWanted = (name) => element("filter").value.toLowerCase().split(/\s+/).every((word) => name.toLowerCase().includes(word));

function drawControls() {
  const stack = currentStack();
  const numbers = (count) => [...Array(count).keys()].map((i) => [i, i]);
  const names = Object.keys(index.models);
  element("filter").hidden = names.length <= COMPARED;
  fill("model", names.filter((name) => name === state.model || isWanted(name)).map((name) => [name, name]));
  const places = Object.keys(index.models[state.model]);
  const circuits = [...new Set(places.map(circuitOf))];
  fill("circuit", circuits.map((name) => [name, { qk: "qk: looks for", ov: "ov: moves" }[name] ?? name]));
  element("circuits").hidden = circuits.length === 1 && !circuits[0];
  fill("stack", places.filter((name) => circuitOf(name) === state.circuit).map((name) => [name, name.split("/").at(-1)]));
  fill("layer", stack.layer_indices.map((layer) => [layer, layer]));
  fill("head", numbers(stack.heads));
  fill("column", index.columns.map((column) => [column.name, column.label]));
  fill("form", Object.entries(index.forms));
  for (const id of SELECTS) element(id).value = state[id];
  element("theme").textContent = themeName() === "dark" ? "Light" : "Dark";
  element("theme").setAttribute("aria-label", `Show the page ${themeName() === "dark" ? "light" : "dark"}`);
  document.documentElement.dataset.theme = themeName();
  drawCompared();
}

function drawCompared() {
  const place = element("with");
  const names = Object.keys(index.models);
  if (!place.querySelector("input")) {
    for (const name of names) {
      const box = Object.assign(document.createElement("input"), { type: "checkbox", value: name });
      box.addEventListener("change", () => set({ with: box.checked ? [...state.with, name] : state.with.filter((each) => each !== name) }));
      const label = document.createElement("label");
      label.append(box, ` ${name}`);
      place.append(label);
    }
  }
  const full = compared().length >= COMPARED;
  for (const box of place.querySelectorAll("input")) {
    box.checked = box.value === state.model || state.with.includes(box.value);
    box.disabled = box.value === state.model || (full && !box.checked);
    box.parentElement.hidden = !box.checked && !isWanted(box.value);
  }
  place.querySelector("legend").textContent = `Models in this picture${names.length > COMPARED ? `, at most ${COMPARED}` : ""}`;
  element("compare").querySelector("summary").textContent = `Models: ${compared().length}`;
}

/** Where the chosen model is from, when it was measured, and by what. */
function originText() {
  const { source, revision, commit, measured, version } = index.origins[state.model] ?? {};
  return [source && `source ${source}`, revision && `revision ${revision}`, commit && commit !== revision && `commit ${commit.slice(0, 12)}`,
    `${measured ? `measured ${measured} by ` : ""}headgram ${version ?? index.version}`].filter(Boolean).join(" · ");
}

function drawText(data) {
  const { meta } = data;
  const column = columnOf(state.column);
  const facts = [meta.architecture, `${data.layers.length} layers × ${meta.heads} heads`, meta.kv_heads === meta.heads ? null : `${meta.kv_heads} ${state.circuit === "ov" ? "value" : "key"} heads`,
    `rank ${meta.rank}`, `width ${meta.hidden}`, meta.stored_dtype];
  element("facts").textContent = facts.filter((fact) => fact !== null && fact !== undefined).join(" · ");
  element("origin").textContent = originText();
  element("strip-subject").textContent = `by ${column.label.toLowerCase()}`;
  const { type } = columnColours(data);
  element("strip-note").textContent = `${column.label}${column.meaning && ": "}${column.meaning}. ${type === "log"
    ? "Colours on a logarithmic scale." : "Colours are clipped at the outermost hundredth of heads."}${chanceOf(column.name)
    ? ` By chance: ${show(chanceOf(column.name).mean)} ± ${show(chanceOf(column.name).deviation)}.` : ""}`;
  const head = `Head ${state.head} of every layer`;
  element("form-head-caption").textContent = head;
  element("side-head-caption").textContent = head;
  const forms = chanceOf(state.form);
  element("form-note").textContent = `The frame is layer ${state.layer}. By chance 0 ± ${show(forms.deviation)}, in the mean over heads ± ${show(forms.deviation / Math.sqrt(meta.heads))}; the best of all by chance is marked on the bar.`;
  const sides = chanceOf(state.side);
  element("side-note").textContent = `‖V_a V_bᵀ‖² / k: 1 for equal spans, by chance k/d = ${show(sides.mean)} ± ${show(sides.deviation)}.`;
  element("neighbours-note").textContent = `Among all other heads, of this layer too: ${{
    cosine: "cosine of the two forms; at −1 one is the other's negative.",
    transposed: "cosine of this form with the other's transpose: near 1, what one looks for with queries the other looks for with keys.",
    right: `overlap of the spans of the top ${meta.directions} right directions: what it looks with, or reads.`,
    left: `overlap of the spans of the top ${meta.directions} left directions: what it looks for, or writes.`,
    signed: `overlap of the spans of the top ${meta.directions} directions of the symmetric parts.`,
  }[state.measure]} By chance: ${show(chanceOf(state.measure).mean)} ± ${show(chanceOf(state.measure).deviation)}.`;
  element("spectrum-subject").textContent = `of head ${state.head} in layer ${state.layer}`;
  element("profile-subject").textContent = column.label;
  element("chosen-title").textContent = `Layer ${state.layer}, head ${state.head}`;
  element("status").textContent = `${state.model}, layer ${state.layer}, head ${state.head}: ${column.label} ${show(data.headValue(state.column, state.layer, state.head))}`;
}

function row(...cells) {
  const line = document.createElement("tr");
  line.append(...cells.map((content, i) => {
    const cell = document.createElement(i ? "td" : "th");
    cell.append(content);
    return cell;
  }));
  return line;
}

function pressed(text, action, spoken = text) {
  const button = Object.assign(document.createElement("button"), { type: "button", className: "link", textContent: text });
  button.setAttribute("aria-label", spoken);
  button.addEventListener("click", action);
  return button;
}

function bar(share, className = "") {
  const outer = Object.assign(document.createElement("span"), { className: `bar ${className}` });
  outer.append(Object.assign(document.createElement("span"), { style: `width: ${(100 * Math.min(1, share)).toFixed(1)}%` }));
  return outer;
}

/** Fill a table's body; the button that had the focus keeps it. */
function fillTable(id, rows) {
  const body = element(id).tBodies[0];
  const focused = [...body.querySelectorAll("button")].indexOf(document.activeElement);
  body.replaceChildren(...rows);
  if (focused >= 0) body.querySelectorAll("button")[focused]?.focus();
}

function drawTables(data) {
  fillTable("values", index.columns.map((column) => {
    const value = data.headValue(column.name, state.layer, state.head);
    const line = row(pressed(column.label, () => set({ column: column.name })), show(value), bar(data.standing(column.name, value)));
    line.title = column.meaning;
    line.classList.toggle("current", column.name === state.column);
    return line;
  }));
  const found = data.neighbours(state.measure, state.layer, state.head);
  fillTable("neighbours", found.map(({ layer, head, value }) =>
    row(pressed(`L${layer} H${head}`, () => set({ layer, head }), `layer ${layer}, head ${head}`), show(value), bar(Math.abs(value), value < 0 ? "negative" : ""))));
  if (!found.length) fillTable("neighbours", [row("None was measured.")]);
}

/** The strongest feeders or readers of the chosen head. */
function drawFeeding(data) {
  element("card-feeding").hidden = !["q", "k", "v"].some((kind) => data.feeding(kind));
  element("feeding-subject").textContent = `layer ${state.layer}, head ${state.head}`;
  for (const side of ["feeders", "readers"]) {
    const found = data.feeding(`${state.kind}/${side}`);
    const rows = [];
    if (found) {
      const { shape: [, layers, heads, count], data: values } = found;
      const [size, start] = [layers * heads * count, (data.position(state.layer) * heads + state.head) * count];
      for (let i = start; i < start + count && values[2 * size + i] > 0; i++) {
        const [layer, head, value] = [data.layers[values[i]], values[size + i], values[2 * size + i]];
        rows.push(row(pressed(`L${layer} H${head}`, () => set({ layer, head }), `layer ${layer}, head ${head}`), show(value), bar(value / Math.sqrt(data.meta.hidden))));
      }
    }
    fillTable(side, rows.length ? rows : [row("None.")]);
  }
}

// ---- Drawing -----------------------------------------------------------------------------------------------------------

let drawing = null;
let outdated = false;

/** Draw what the state says; what is chosen meanwhile is drawn after, and what it overtook is left out. */
function draw() {
  outdated = true;
  drawing ??= (async () => {
    try {
      while (outdated) {
        outdated = false;
        await drawOnce();
      }
    } catch (error) {
      element("status").textContent = error.message;
      element("status").classList.add("error");
      console.error(error);
    } finally {
      drawing = null;
    }
  })();
  return drawing;
}

const stacks = new Map(); // model and stack -> StackData

async function drawOnce() {
  drawControls();
  writeAddress();
  const arrays = await loadModel(state.model);
  const key = JSON.stringify(inStack());
  if (!stacks.has(key)) stacks.set(key, new StackData(arrays, state.stack, currentStack()));
  const data = stacks.get(key);
  element("status").classList.remove("error");
  drawText(data);
  drawTables(data);
  drawFeeding(data);
  for (const picture of pictures) {
    if (outdated) return;
    await picture.draw(data);
    if (!performance.getEntriesByName("first-picture").length) performance.mark("first-picture");
  }
}

function set(wish) {
  choose(wish);
  return draw();
}

async function start() {
  const unpacked = await unpack(element("index").textContent);
  index = unpacked.meta;
  quartiles = unpacked.arrays;
  makePictures();
  for (const id of ["model", "circuit", "stack", "layer", "head", "column", "form", ...SELECTS]) {
    element(id).addEventListener("change", (event) => set({ [id]: event.target.value }));
  }
  element("filter").addEventListener("input", drawControls);
  element("theme").addEventListener("click", () => set({ theme: themeName() === "dark" ? "light" : "dark" }));
  element("compare").addEventListener("keydown", (event) => { if (event.key === "Escape") element("compare").open = false; });
  document.addEventListener("click", (event) => { if (!element("compare").contains(event.target)) element("compare").open = false; });
  for (const medium of [prefersDark, prints]) medium.addEventListener("change", draw);
  addEventListener("hashchange", () => { replaces = true; return set(readAddress()); });
  addEventListener("scroll", () => showTip(null, null), { passive: true });
  return set(readAddress());
}

// What a script beside the page calls, and what a test or a console may ask.
globalThis.headgram = {
  receive: (name, text) => awaited.get(name)(text),
  state,
  set,
  settled: async () => { while (drawing) await drawing; },
  rows: (id, set) => pictures.find((picture) => picture.id === id).view.data(set),
  matrix: () => {
    const { rows, columns, value } = pictures.find((picture) => picture.id === "matrix").shown;
    return { rows, columns, values: rows.map((_, i) => columns.map((_, j) => value(i, j))) };
  },
  view: (id) => pictures.find((picture) => picture.id === id).view,
};

headgram.started = start();
