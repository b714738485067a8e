// Pictures: Vega specifications whose data, colours and labels follow from the state.

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
    setSignals(spec, theme());
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
      return Array.from(data.column(state.column), (value, i) => ({ layer: data.layers[Math.floor(i / heads)], head: i % heads, value }))
        .filter((row) => !Number.isNaN(row.value));
    }],
    chosen: [inHead(), () => [{ layer: state.layer, head: state.head }]],
  }),
  label: () => `All heads of ${state.model}, layer by head, coloured by ${columnOf(state.column).label}`,
  tip: (row) => [`Layer ${row.layer}, head ${row.head}`, `${columnOf(state.column).label}: ${show(row.value)}`,
    ...againstChance(state.column, row.value, row.layer)],
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
      ...againstChance(kind(), row.value, row.layer_a, mean),
    ],
    pick: (row) => row.layer_a !== undefined && set({ layer: row.layer_a }),
  };
}

function lines(part, name) {
  return {
    kind: (data) => [state.scale, state.scale === "linear" || inLayer()],
    adapt: (spec, data) => {
      if (state.scale === "linear") return;
      const largest = data.largest(part, state.layer);
      if (!largest) return;
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
    const width = element("profile").clientWidth;
    const most = Math.floor((width - 60) / 7); // characters that fit on a line
    const longest = Math.min(most, Math.max(...names.map((name) => name.length)));
    const text = { signal: `${JSON.stringify(names.map((name) => cut(name, most)))}[indexof(${JSON.stringify(names)}, datum.value)]` };
    for (const [scale, look] of [["color", "colour"], ["strokeDash", "dash"]]) {
      Object.assign(spec.scales.find((each) => each.name === scale), { domain: names, range: compared().map((model) => looks(model)[look]) });
    }
    for (const legend of spec.legends) {
      Object.assign(legend, { strokeDash: "strokeDash", columns: Math.max(1, Math.floor(width / (7 * longest + 40))), labelLimit: width - 50, encode: { labels: { update: { text } } } });
    }
    if (profileIsWide()) Object.assign(spec.scales.find((each) => each.name === "y"), { type: "log", nice: false, zero: false });
    spec.axes.filter((axis) => axis.title === "relative depth").forEach((axis) => {
      axis.title = state.depth === "layer" ? "layer" : "relative depth";
      if (state.depth === "layer") whole(Object.assign(axis, { labelSeparation: 6 }));
    });
  },
  sets: (data) => ({
    profile: [[state.model, state.stack, state.with, state.column, state.depth], profileRows],
    chance: [[inStack(), state.column, profileIsWide()], () => chanceBand(state.column).filter(({ from }) => from > 0 || !profileIsWide())],
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
    new Picture("turns", "steps", turns),
    new Picture("waves", "steps", waves),
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
