// A training: numbers of the chosen layer's heads, or of all layers, over the steps of the chosen model's lineage.

const lineageOf = (model) => Object.values(index.models[model])[0].lineage;
/** Which of the page's lineages a model is drawn in; -1 if in none. */
const numberOf = (model) => index.lineages.findIndex((members) => members.includes(model));
const membersOf = (model) => index.lineages[numberOf(model)] ?? [];
const stepOf = (model) => Object.values(index.models[model])[0].step;

/** Names in natural order, `step9` before `step10`, but those of a lineage in the order of its steps. */
function inOrder(names) {
  const natural = new Intl.Collator("en", { numeric: true });
  const key = (name) => (name in index.models && lineageOf(name)) || name;
  return [...names].sort((a, b) => natural.compare(key(a), key(b)) || (stepOf(a) ?? 0) - (stepOf(b) ?? 0) || natural.compare(a, b));
}

const lineages = new Map(); // number -> promise of its arrays

function loadLineage(number) {
  if (!lineages.has(number)) {
    const place = `lineages/${number}`;
    const loading = loadBeside(place, `${place}.js`).then(unpack).then((found) => found.arrays);
    loading.catch(() => lineages.delete(number));
    lineages.set(number, loading);
  }
  return lineages.get(number);
}

/** What is drawn: of each head of the chosen layer, or of each layer, its line, and whether it is the chosen one. */
class Steps {
  constructor(model, arrays) {
    this.members = membersOf(model);
    this.arrays = arrays;
  }

  /** Where a model stands along the picture. */
  x(i) {
    return state.along === "order" ? i : stepOf(this.members[i]);
  }

  /** The values of all lines at every model: its arrays, and where each line begins in it. */
  lines(data) {
    const { heads } = data.meta;
    const layers = data.layers.length;
    const at = (part) => this.arrays[`${state.stack}/${part}`]?.data;
    const layer = data.position(state.layer);
    const ofHeads = (values, size, offset) => Array.from({ length: heads }, (_, head) => ({
      line: head, pick: { head }, chosen: head === state.head, value: (i) => values[i * size + offset + layer * heads + head],
    }));
    const ofLayers = (value) => data.layers.map((each, place) => ({
      line: each, pick: { layer: each }, chosen: each === state.layer, value: (i) => value(i, place),
    }));
    if (!at("heads")) return [];
    const columns = index.columns.length;
    const column = index.columns.findIndex(({ name }) => name === state.column);
    if (state.steps === "first" || state.steps === "previous") return ofHeads(at(state.steps), layers * heads, 0);
    if (state.steps === "heads") return ofHeads(at("heads"), columns * layers * heads, column * layers * heads);
    if (state.steps === "median") {
      return ofLayers((i, place) => quartiles[`${this.members[i]}/${state.stack}`].data[(columns + column) * layers + place]);
    }
    const names = Object.keys(index.layer_columns);
    return ofLayers((i, place) => at("layers")[(i * names.length + names.indexOf(state.steps)) * layers + place]);
  }

  rows(data, chosen) {
    return this.lines(data).filter((line) => line.chosen === chosen).flatMap(({ line, pick, value }) =>
      this.members.map((model, i) => ({ line, ...pick, model, step: stepOf(model), x: this.x(i), value: value(i) }))
        .filter((row) => Number.isFinite(row.value)));
  }
}

const stepsNames = () => ({
  heads: `${columnOf(state.column).label}, of every head`,
  median: `${columnOf(state.column).label}, median of every layer`,
  first: "cosine to the first",
  previous: "cosine to the previous",
  ...index.layer_columns,
});
const ofHeads = () => ["heads", "first", "previous"].includes(state.steps);
const stepsKey = () => [state.steps, state.along, state.stack, lineageOf(state.model), state.column, state.layer, ofHeads() && state.head];

const stepsPicture = {
  kind: () => [state.along, lineageOf(state.model)],
  adapt: (spec, data) => {
    const x = spec.scales.find((each) => each.name === "x");
    const axis = spec.axes.filter((each) => each.scale === "x" && each.title);
    const steps = data.steps.members.map(stepOf);
    if (state.along === "log") {
      const constant = Math.min(...steps.map(Math.abs).filter((size) => size > 0)); // two models never have one step
      Object.assign(x, { type: "symlog", constant, nice: false });
      const powers = [...Array(24).keys()].map((power) => 10 ** (power - 12)).filter((power) => power >= constant);
      const marks = [0, ...powers, ...powers.map((power) => -power)].filter((value) => value >= Math.min(...steps) && value <= Math.max(...steps));
      if (marks.length > 1) axis.forEach((each) => { each.values = marks; });
    }
    axis.forEach((each) => {
      each.title = state.along === "order" ? "checkpoint, in the order of steps" : "step";
      if (state.along === "order") whole(each);
      else each.encode = { ...each.encode, labels: { update: { text: { signal: "format(datum.value, abs(datum.value) < 1 ? '~g' : '~s')" } } } };
    });
  },
  sets: (data) => ({
    others: [stepsKey(), () => data.steps.rows(data, false)],
    chosen: [stepsKey(), () => data.steps.rows(data, true)],
    chance: [[inStack(), state.steps, state.column], () => (["heads", "median"].includes(state.steps) ? chanceBand(state.column) : [])],
    now: [[state.model, state.along], () => [{ x: data.steps.x(data.steps.members.indexOf(state.model)) }]],
  }),
  label: () => `${stepsNames()[state.steps]}, over the steps of ${lineageOf(state.model)}, ${ofHeads() ? `heads of layer ${state.layer}` : "all layers"}`,
  tip: (row) => [`${row.model}, step ${show(row.step)}`, `${ofHeads() ? `Layer ${state.layer}, head` : "Layer"} ${row.line}: ${show(row.value)}`],
  pick: (row) => row.line !== undefined && set({ model: row.model, ...(row.head !== undefined && { head: row.head }), ...(row.layer !== undefined && { layer: row.layer }) }),
};

/** The card of a lineage, for models that belong to one. */
async function drawSteps(data) {
  const members = membersOf(state.model);
  element("card-steps").hidden = !members.length;
  if (!members.length) return;
  fill("steps", Object.entries(stepsNames()));
  data.steps = new Steps(state.model, await loadLineage(numberOf(state.model)));
  element("steps-subject").textContent = `${lineageOf(state.model)}, ${members.length} models`;
  const [found, asked] = [data.steps.rows(data, true).length, members.length - 1];
  const missing = found < asked ? `${found} of ${asked} models were compared so: the option lineage.pairs says which. ` : "";
  element("steps-note").textContent = `${missing}Orange: ${ofHeads() ? `head ${state.head} of layer ${state.layer}. Grey: the other heads of the layer` : `layer ${state.layer}. Grey: the other layers`}. The dashed line is ${state.model}. A click near a line chooses the line, and the model there.`;
  await stepsPictureDrawn.draw(data);
}

let stepsPictureDrawn;
