"use strict";
// The models' arrays: how they are unpacked, and what the pictures read of them.

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
    const loading = text.then(unpack).then(({ meta, arrays }) => ({ ...arrays, words: meta?.words ?? {}, partners: meta?.partners ?? {} }));
    loading.catch(() => models.delete(name));
    models.set(name, loading);
  }
  return models.get(name);
}

function loadBeside(name, path = `data/${name}.js`) {
  return new Promise((resolve, reject) => {
    awaited.set(name, resolve);
    const script = document.createElement("script");
    script.src = path.split("/").map(encodeURIComponent).join("/");
    script.onerror = () => reject(new Error(`The data of ${name} are missing: keep this page together with the folders beside it, so that it finds ${path}.`));
    document.head.append(script);
  });
}

// ---- Numbers -----------------------------------------------------------------------------------------------------------

const counted = (count, what) => `${count} ${what}${count === 1 ? "" : "s"}`;
const labelled = new Intl.NumberFormat("en", { maximumSignificantDigits: 4, useGrouping: false });
const scientific = (value) => value.toExponential(2).replace("e+", "e");

function show(value) {
  if (Number.isNaN(value)) return "–";
  const size = Math.abs(value);
  return (size !== 0 && (size < 1e-3 || size >= 1e6) ? scientific(value) : labelled.format(value)).replace("-", "−");
}

function quantile(values, share) {
  const sorted = Float32Array.from(values).filter((value) => !Number.isNaN(value)).sort();
  return sorted.length ? sorted[Math.min(sorted.length - 1, Math.floor(share * sorted.length))] : 0;
}

/** What the pictures read of the chosen stack; everything derived is computed once. */
class StackData {
  constructor(arrays, name, meta) {
    this.at = (part) => arrays[`${name}/${part}`];
    const ofStack = (part) => arrays[`${name.split("/").at(-1)}/${part}`]; // whatever the circuit
    this.feeding = (part) => ofStack(`feeding/${part}`);
    this.across = (part) => ofStack(`across/${part}`); // with the heads of another stack
    this.partner = arrays.partners[name.split("/").at(-1)];
    this.positions = (norms, part) => ofStack(`positions/${norms}/${part}`);
    this.words = arrays.words[name]; // texts of tokens, where there are any
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

  /** What chance gives of a column, in a layer; undefined where nothing says it. */
  expected(name, layer) {
    const found = this.at("expected").data[index.columns.findIndex((column) => column.name === name) * this.layers.length + this.position(layer)];
    return this.meta.chance[name]?.mean ?? (Number.isNaN(found) ? undefined : found);
  }

  position(layer) {
    return this.layers.indexOf(layer);
  }

  headValue(name, layer, head) {
    return this.column(name)[this.position(layer) * this.meta.heads + head];
  }

  /** The share of the stack's heads whose value is not above this one's. */
  standing(name, value) {
    const sorted = this.once(`sorted ${name}`, () => this.column(name).filter((each) => !Number.isNaN(each)).sort());
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

  /** The directions of a head that tokens were found for, with the tokens at both ends. */
  tokens(layer, head) {
    if (!this.words) return [];
    const [places, deviations, share] = ["places", "deviations", "share"].map((part) => this.at(`tokens/${part}`));
    const [, , heads, sides, directions, ends, count] = places.shape;
    const size = places.data.length / 2;
    const start = (this.position(layer) * heads + head) * sides * directions;
    return ["right", "left"].flatMap((side, i) => Array.from({ length: directions }, (_, direction) => {
      const at = start + i * directions + direction;
      const found = Array.from({ length: ends }, (_, end) => ({
        deviations: deviations.data[at * ends + end],
        texts: Array.from({ length: count }, (_, place) => {
          const cell = (at * ends + end) * count + place;
          return this.words.texts[4096 * places.data[cell] + places.data[size + cell]];
        }).filter(Boolean),
      }));
      return { side, direction, share: share.data[at], ends: found };
    })).filter(({ ends: [end] }) => end.texts.length);
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
