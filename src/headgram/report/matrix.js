// All heads with all heads, on a canvas: a mark for every pair would be too many. See matrix.py for what is drawn.

/** The symmetric matrix whose upper triangle is given row by row. */
function symmetric(triangle) {
  const size = (Math.sqrt(8 * triangle.length + 1) - 1) / 2;
  const matrix = new Float32Array(size * size);
  for (let a = 0, place = 0; a < size; a++) {
    for (let b = a; b < size; b++, place++) matrix[a * size + b] = matrix[b * size + a] = triangle[place];
  }
  return { size, matrix };
}

/** Colours of a diverging scale, `[red, green, blue]` at a place between -1 and 1. */
function diverging(colours) {
  const stops = colours.map((colour) => [1, 3, 5].map((start) => parseInt(colour.slice(start, start + 2), 16)));
  return (place) => {
    const at = ((Math.min(1, Math.max(-1, place)) + 1) / 2) * (stops.length - 1);
    const low = Math.min(Math.floor(at), stops.length - 2);
    return stops[low].map((value, i) => value + (at - low) * (stops[low + 1][i] - value));
  };
}

/**
 * The matrix in the page. It is drawn whole, or as the heads of two layers (`state.zoom`, "a-b").
 *
 * A cell of the whole matrix is one pair, or of many heads the pair of largest magnitude among neighbours.
 */
class Matrix {
  constructor(id) {
    Object.assign(this, { id, place: element(id), drawnFor: null });
    this.canvas = this.place.appendChild(document.createElement("canvas"));
    this.place.setAttribute("role", "application");
    this.place.setAttribute("aria-roledescription", "picture");
    this.view = { toCanvas: async (scale) => this.enlarged(scale), toSVG: async () => this.drawing() };
    this.place.addEventListener("keydown", (event) => (event.key === "Enter" ? this.turnZoom() : move(event, id)));
    this.canvas.addEventListener("click", (event) => this.pick(event));
    this.canvas.addEventListener("pointermove", (event) => this.hover(event));
    this.canvas.addEventListener("pointerleave", () => showTip(null, null));
    element("zoom").addEventListener("click", () => this.turnZoom());
    this.place.after(saveButtons(this));
  }

  turnZoom() {
    if (state.zoom) return set({ zoom: "" });
    const [layer] = this.other();
    return set({ zoom: `${state.layer}-${layer}` });
  }

  /** Layer and head of the other head of the pair that is chosen; the chosen head itself if there is none. */
  other() {
    return state.other ? state.other.split(".").map(Number) : [state.layer, state.head];
  }

  async draw(data) {
    this.data = data;
    this.place.setAttribute("aria-label", this.label());
    for (const choice of element("pairs").options) choice.disabled = ["q", "k", "v"].includes(choice.value) && !data.feeding(choice.value);
    element("card-matrix").hidden = !data.at("matrix/order") || (this.flows() && !data.feeding(state.pairs));
    if (element("card-matrix").hidden) return;
    const wanted = JSON.stringify([inStack(), state.pairs, state.order, state.zoom, themeName()]);
    if (wanted !== this.drawnFor) {
      this.shown = state.zoom ? await this.block(data) : this.whole(data);
      this.paint();
      this.drawnFor = wanted;
    }
    this.frame();
    await this.say();
  }

  /** What is drawn of all heads: size, values, and the heads of a cell as places in layer order. */
  whole(data) {
    const heads = data.meta.heads * data.layers.length;
    if (this.flows()) return this.written(data, heads);
    const order = state.order === "cluster" ? Array.from(data.at("matrix/order").data) : [...Array(heads).keys()];
    const own = data.at(`matrix/${state.pairs}/${state.order}`);
    const found = data.once(`matrix ${state.pairs} ${own ? state.order : "layer"}`, () => symmetric((own ?? data.at(`matrix/${state.pairs}/layer`)).data));
    const step = Math.ceil(heads / found.size);
    const rows = Array.from({ length: found.size }, (_, i) => order.slice(i * step, (i + 1) * step));
    const turned = own ? [...Array(found.size).keys()] : order;
    return { rows, columns: rows, value: (i, j) => found.matrix[turned[i] * found.size + turned[j]], single: step === 1 };
  }

  /** Whether one head writes and the other reads: compositions. */
  flows() {
    return ["q", "k", "v"].includes(state.pairs);
  }

  /** Compositions of all heads, in the order of layers: a row writes for the columns of later layers. */
  written(data, heads) {
    const { size, matrix } = data.once(`feeding ${state.pairs}`, () => symmetric(data.feeding(state.pairs).data));
    const step = Math.ceil(heads / size);
    const rows = Array.from({ length: size }, (_, i) => Array.from({ length: Math.min(step, heads - i * step) }, (_, k) => i * step + k));
    return { rows, columns: rows, value: (i, j) => (i <= j ? matrix[i * size + j] : 0), single: step === 1 };
  }

  /** The heads of two layers, exactly. */
  async block(data) {
    const [a, b] = state.zoom.split("-").map(Number);
    const { heads } = data.meta;
    const value = await this.row(data, a);
    const places = (layer) => Array.from({ length: heads }, (_, i) => [data.position(layer) * heads + i]);
    return { rows: places(a), columns: places(b), value: (i, j) => value(state.pairs, i, data.position(b) * heads + j), single: true };
  }

  /** The heads of a layer with all heads: a function of the value's name, the head, and the other's place. */
  async row(data, layer) {
    const { heads } = data.meta;
    if (!data.at("matrix/cosine/cluster")) {
      const first = data.position(layer) * heads;
      return (name, head, place) => {
        if (data.feeding(name)) {
          const { size, matrix } = data.once(`feeding ${name}`, () => symmetric(data.feeding(name).data));
          return first + head < place ? matrix[(first + head) * size + place] : 0;
        }
        const { size, matrix } = data.once(`matrix ${name} layer`, () => symmetric(data.at(`matrix/${name}/layer`).data));
        return matrix[(first + head) * size + place];
      };
    }
    const name = state.stack.split("/").at(-1); // compositions lie with the first form of the circuit `qk`
    const stack = this.flows() ? Object.keys(index.models[state.model]).find((each) => /^qk\b.*\//.test(each) && each.endsWith(`/${name}`)) : state.stack;
    const arrays = await loadModel(`${state.model}/${stack.replace("/", "-")}-${layer}`);
    return (name, head, place) => arrays[name].data[head * arrays[name].shape[1] + place];
  }

  /** Noise must look like noise: colours reach three times what the best of so many random pairs would. */
  reach() {
    const { rows, columns, value } = this.shown;
    const sizes = [];
    for (let i = 0; i < rows.length; i++) {
      for (let j = 0; j < columns.length; j++) if (rows[i][0] !== columns[j][0]) sizes.push(Math.abs(value(i, j)));
    }
    if (this.flows()) return Math.max(quantile(sizes, 0.998), 3);
    return Math.min(1, Math.max(quantile(sizes, 0.995), index.pale * this.best()));
  }

  /** The largest cosine of all pairs by chance. */
  best() {
    return chanceOf(state.pairs).best_pair;
  }

  paint() {
    const { rows, columns, value } = this.shown;
    Object.assign(this.canvas, { width: columns.length, height: rows.length });
    const context = this.canvas.getContext("2d");
    const image = context.createImageData(columns.length, rows.length);
    const middle = diverging(theme().diverging);
    const colour = this.flows() ? (share) => middle(Math.max(0, (share * this.limit - 1) / (this.limit - 1))) : middle;
    this.limit = this.reach();
    for (let i = 0, place = 0; i < rows.length; i++) {
      for (let j = 0; j < columns.length; j++, place += 4) {
        image.data.set([...colour(value(i, j) / this.limit), 255], place);
      }
    }
    context.putImageData(image, 0, 0);
    this.canvas.style.aspectRatio = `${columns.length} / ${rows.length}`;
    this.scale();
  }

  /** The legend: the colours from -limit to limit, with the best by chance marked. */
  scale() {
    const legend = element("matrix-scale");
    const { diverging: colours } = theme();
    legend.style.background = `linear-gradient(to right, ${(this.flows() ? colours.slice(3) : colours).join(", ")})`;
    const mark = (value, text) => {
      const label = Object.assign(document.createElement("span"), { textContent: text });
      label.style.left = `${this.flows() ? (100 * (value - 1)) / (this.limit - 1) : 50 + (50 * value) / this.limit}%`;
      return label;
    };
    if (this.flows()) return legend.replaceChildren(mark(1, "chance"), mark(this.limit, `${show(this.limit)} × chance`));
    legend.replaceChildren(...marksAround(0, this.limit, this.best()).map((each) => mark(each[0], markText(each))));
  }

  /** Frames around the chosen head's row and the other's column. */
  frame() {
    const at = ([layer, head], cells) => {
      const place = this.data.position(layer) * this.data.meta.heads + head;
      return cells.findIndex((cell) => cell.includes(place));
    };
    const frame = element("matrix-frame");
    const [row, column] = [at([state.layer, state.head], this.shown.rows), at(this.other(), this.shown.columns)];
    frame.hidden = row < 0 || column < 0;
    const [width, height] = [100 / this.shown.columns.length, 100 / this.shown.rows.length];
    Object.assign(frame.style, { left: `${column * width}%`, top: `${row * height}%`, width: `${width}%`, height: `${height}%` });
  }

  /** The cell under the pointer: its row and column, and the heads that it stands for. */
  cell(event) {
    const box = this.canvas.getBoundingClientRect();
    const { rows, columns } = this.shown;
    const at = (offset, length, count) => Math.min(count - 1, Math.max(0, Math.floor((offset / length) * count)));
    const [i, j] = [at(event.clientY - box.top, box.height, rows.length), at(event.clientX - box.left, box.width, columns.length)];
    const head = (place) => [this.data.layers[Math.floor(place / this.data.meta.heads)], place % this.data.meta.heads];
    return { i, j, a: head(rows[i][0]), b: head(columns[j][0]), last: [head(rows[i].at(-1)), head(columns[j].at(-1))] };
  }

  hover(event) {
    const { i, j, a, b, last } = this.cell(event);
    const name = ([layer, head]) => `L${layer} H${head}`;
    const value = this.shown.value(i, j);
    const span = (first, final) => (name(first) === name(final) ? name(first) : `${name(first)} to ${name(final)}`);
    const times = show(Math.round(Math.abs(value) * this.data.meta.hidden));
    if (this.flows()) return showTip(event, [`${span(a, last[0])} writes for ${span(b, last[1])}`, `${show(value)} × chance`]);
    return showTip(event, [`${span(a, last[0])} with ${span(b, last[1])}`, `${option("pairs")}: ${show(value)}, ${times} × chance${this.shown.single ? "" : " (the largest among these)"}`]);
  }

  pick(event) {
    const { a, b } = this.cell(event);
    const wish = { layer: a[0], head: a[1], other: b.join(".") };
    // Of many heads, one cell is no pair: look closer.
    set(this.shown.single || state.order === "cluster" ? wish : { ...wish, zoom: `${a[0]}-${b[0]}` });
  }

  /** A sentence about the chosen pair. */
  async say() {
    const [layer, head] = this.other();
    const { heads, hidden, kv_heads: shared } = this.data.meta;
    element("zoom").textContent = state.zoom ? "All layers" : layer === state.layer ? `Layer ${layer} alone` : `Layers ${state.layer} and ${layer} alone`;
    if (layer === state.layer && head === state.head) {
      element("pair").textContent = "Choose a cell: its row is the chosen head, its column the other.";
      return;
    }
    const value = await this.row(this.data, state.layer);
    const place = this.data.position(layer) * heads + head;
    const pair = `Layer ${state.layer}, head ${state.head} with layer ${layer}, head ${head}`;
    if (this.flows()) {
      const kinds = { q: "queries", k: "keys", v: "values" };
      const known = Object.keys(kinds).filter((kind) => this.data.feeding(kind));
      element("pair").textContent = layer > state.layer
        ? `${pair}, which reads what it writes: ${known.map((kind) => `through ${kinds[kind]} ${show(value(kind, state.head, place))} × chance`).join(", ")}.`
        : `${pair}: only a head of an earlier layer writes for another.`;
      return;
    }
    const found = ["cosine", "transposed"].map((name) => value(name, state.head, place));
    const group = (each) => Math.floor((each * shared) / heads);
    const same = layer === state.layer && group(head) === group(state.head);
    element("pair").textContent =
      `${pair}: cosine ${show(found[0])} (${show(Math.round(Math.abs(found[0]) * hidden))} × chance), ` +
      `with the transpose ${show(found[1])} (${show(Math.round(Math.abs(found[1]) * hidden))} × chance)${same ? "; they share a factor, and that alone makes them alike" : ""}.`;
  }

  label() {
    const heads = state.zoom ? `the heads of layers ${state.zoom.replace("-", " and ")}` : "all heads with all heads";
    return `${option("pairs")[0].toUpperCase()}${option("pairs").slice(1)}: ${heads} of ${state.model}`;
  }

  /** The picture as large as a saved one should be. */
  enlarged(scale) {
    const side = 600 * scale;
    const canvas = Object.assign(document.createElement("canvas"), { width: side, height: Math.round((side * this.canvas.height) / this.canvas.width) });
    const context = canvas.getContext("2d");
    context.imageSmoothingEnabled = false;
    context.drawImage(this.canvas, 0, 0, canvas.width, canvas.height);
    return canvas;
  }

  drawing() {
    const { width, height } = this.enlarged(1);
    const image = this.canvas.toDataURL("image/png");
    return `<svg xmlns="http://www.w3.org/2000/svg" width="${width}" height="${height}"><image width="${width}" height="${height}" href="${image}" style="image-rendering: pixelated"/></svg>`;
  }

  /** Of every cell that is drawn: its first heads, and the value. */
  rows() {
    const { rows, columns, value } = this.shown;
    const { heads } = this.data.meta;
    const place = (cell, side) => ({ [`layer_${side}`]: this.data.layers[Math.floor(cell[0] / heads)], [`head_${side}`]: cell[0] % heads });
    return rows.flatMap((row, i) => columns.map((column, j) => ({ ...place(row, "a"), ...place(column, "b"), value: value(i, j) })));
  }
}
