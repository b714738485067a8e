// How the forms of queries and keys turn: over the offset, and by the wavelength of what turns.

const AT_OFFSETS = ["cosine", "norm", "transposed", "symmetry", "trace"]; // as positions.py lays them out

/** What is known of one stack in the chosen form: null where positions turn nothing. */
class Positions {
  static of(data) {
    const norms = ["raw", "folded"].filter((each) => data.positions(each, "at"));
    return norms.length && state.circuit.startsWith("qk") ? new Positions(data, norms) : null;
  }

  constructor(data, norms) {
    Object.assign(this, { data, norms, layer: data.position(state.layer), heads: data.meta.heads });
    state.norms = norms.includes(state.norms) ? state.norms : norms[0];
    this.offsets = Array.from(this.part("offsets").data);
    state.offset = this.offsets.includes(Number(state.offset)) ? Number(state.offset) : this.offsets.find((each) => each === 1) ?? 0;
  }

  part(name) {
    return this.data.positions(state.norms, name);
  }

  /** Whether positions turn the chosen layer. */
  get turns() {
    return !Number.isNaN(this.at("norm", state.head, 0));
  }

  at(name, head, place) {
    const { shape: [, layers, heads, offsets], data } = this.part("at");
    return data[((AT_OFFSETS.indexOf(name) * layers + this.layer) * heads + head) * offsets + place];
  }

  /** What chance gives: of the cosine alone. */
  expected(place) {
    return this.part("expected").data[this.layer * this.offsets.length + place];
  }

  wavelengths() {
    const { shape: [, planes], data } = this.part("wavelengths");
    return data.subarray(this.layer * planes, (this.layer + 1) * planes);
  }

  share(head, plane) {
    const { shape: [, heads, planes], data } = this.part("share");
    return data[(this.layer * heads + head) * planes + plane];
  }

  /** The share that no rotation touches, and what chance gives of it; NaN where every row turns. */
  still() {
    const { shape: [, planes], data } = this.part("share_expected");
    return [this.share(state.head, planes - 1), data[(this.layer + 1) * planes - 1]];
  }

  /** Rows of the layer's heads, the chosen one alone or all others. */
  ofHeads(chosen, rows) {
    return [...Array(this.heads).keys()].filter((head) => (head === state.head) === chosen).flatMap((head) =>
      rows(head).filter((row) => Number.isFinite(row.value)).map((row) => ({ line: head, head, ...row })));
  }

  overOffsets(chosen) {
    return this.ofHeads(chosen, (head) => this.offsets.map((x, i) => ({ x, value: this.at(state.turning, head, i) })));
  }

  byWavelength(chosen) {
    const lengths = this.wavelengths();
    return this.ofHeads(chosen, (head) => Array.from(lengths, (x, plane) => ({ x, value: Number.isNaN(x) ? NaN : this.share(head, plane) })));
  }

  chanceOverOffsets() {
    return state.turning === "cosine" ? this.offsets.map((x, i) => ({ line: "chance", x, value: this.expected(i) })).filter((row) => Number.isFinite(row.value)) : [];
  }

  chanceByWavelength() {
    const { shape: [, planes], data } = this.part("share_expected");
    return Array.from(this.wavelengths(), (x, plane) => ({ line: "chance", x, value: data[this.layer * planes + plane] })).filter((row) => Number.isFinite(row.x));
  }
}

function axisOf(spec, title, scale, values) {
  Object.assign(spec.scales.find((each) => each.name === "x"), { nice: false, ...scale });
  spec.axes.filter((axis) => axis.scale === "x" && axis.title).forEach((axis) => Object.assign(axis, { title, values, labelOverlap: "greedy", labelSeparation: 6 }));
}

const positionsKey = () => [...inHead(), state.norms];
const headOf = (row) => (row.line === "chance" ? `By chance in layer ${state.layer}` : `Layer ${state.layer}, head ${row.line}`);

const turns = {
  kind: (data) => [inStack(), data.turning.offsets],
  adapt: (spec, data) => axisOf(spec, "tokens from the key to the query", { type: "symlog", constant: 1 }, data.turning.offsets),
  sets: (data) => ({
    others: [[positionsKey(), state.turning], () => data.turning.overOffsets(false)],
    chosen: [[positionsKey(), state.turning], () => data.turning.overOffsets(true)],
    expected: [[positionsKey(), state.turning], () => data.turning.chanceOverOffsets()],
    now: [[positionsKey(), state.offset], () => (data.turning.turns ? [{ x: state.offset }] : [])],
  }),
  label: () => `${option("turning")} over the offset, heads of layer ${state.layer}, norms ${option("norms")}`,
  tip: (row) => [headOf(row), `at ${show(row.x)} tokens: ${show(row.value)}`],
  pick: (row) => row.x !== undefined && set({ offset: row.x, ...(row.head !== undefined && { head: row.head }) }),
};

const waves = {
  kind: (data) => [inLayer(), state.norms, data.turning.turns],
  adapt: (spec, data) => {
    const lengths = Array.from(data.turning.wavelengths()).filter(Number.isFinite);
    const [low, high] = [Math.min(...lengths), Math.max(...lengths)];
    const powers = [...Array(16).keys()].map((power) => 10 ** power).filter((power) => power >= low && power <= high);
    axisOf(spec, "wavelength in tokens", lengths.length ? { type: "log" } : {}, powers.length > 1 ? powers : undefined);
    spec.scales.find((each) => each.name === "y").zero = true;
  },
  sets: (data) => ({
    others: [positionsKey(), () => data.turning.byWavelength(false)],
    chosen: [positionsKey(), () => data.turning.byWavelength(true)],
    expected: [positionsKey(), () => data.turning.chanceByWavelength()],
    now: [[], () => []],
  }),
  label: () => `Share of energy by wavelength, heads of layer ${state.layer}, norms ${option("norms")}`,
  tip: (row) => [headOf(row), `wavelength ${show(row.x)} tokens: ${show(row.value)} of the energy`],
  pick: (row) => row.head !== undefined && set({ head: row.head }),
};

/** The card of heads that positions turn: false where nothing does. */
function drawPositions(data) {
  data.turning = Positions.of(data);
  const found = data.turning;
  element("card-positions").hidden = !found;
  if (!found) return false;
  const place = found.offsets.indexOf(state.offset);
  Object.assign(element("offset"), { max: found.offsets.length - 1, value: place });
  element("offset").setAttribute("aria-valuetext", `${state.offset} tokens`);
  element("offset-value").textContent = show(state.offset);
  for (const choice of element("norms").options) choice.disabled = !found.norms.includes(choice.value);
  element("norms").value = state.norms;
  element("turns-caption").textContent = option("turning");
  element("positions-subject").textContent = `layer ${state.layer}, head ${state.head}`;
  const [still, ofChance] = found.still();
  const [cosine, norm, transposed, symmetry, trace] = AT_OFFSETS.map((name) => show(found.at(name, state.head, place)));
  element("offset-values").textContent = found.turns ? `At offset ${show(state.offset)} the form has norm ${norm}, symmetry ${symmetry} and trace ${trace}. Its cosine with the form at offset 0 is ${cosine} (by chance ${show(found.expected(place))}), with the transpose of that ${transposed}.` : `Positions do not turn the queries and keys of layer ${state.layer}.`;
  element("positions-note").textContent = `A positive offset is a query after its key. Grey: the other heads of the layer; dotted: by chance.${Number.isNaN(still) ? "" : ` Rows that no rotation touches hold ${show(still)} of the energy, by chance ${show(ofChance)}.`}`;
  return true;
}
