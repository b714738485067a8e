// The page: what is chosen (the state, kept in the address), the controls that choose, and the drawing of what follows.

const element = (id) => document.getElementById(id);

// ---- The state ---------------------------------------------------------------------------------------------------------

const SELECTS = ["side", "measure", "scale", "depth", "pairs", "order", "kind", "along", "turning"]; // whose options do not depend on the model
const COMPARED = 8; // as many models as there are colours
const state = {};
let index; // columns, models, stacks; the quartiles of all models
let quartiles;

const stackOf = (model, stack) => index.models[model][stack] ?? Object.values(index.models[model])[0];
/** The columns that have values in the chosen stack. */
function offered() {
  const place = Object.keys(index.models[state.model]).find((name) => currentStack() === index.models[state.model][name]);
  const { shape: [, , layers], data } = quartiles[`${state.model}/${place}`];
  return index.columns.filter((_, i) => data.subarray(i * layers, (i + 1) * layers).some((value) => !Number.isNaN(value)));
}
// Forms are called `qk`, `ov-folded`, `qk@8` or `qk-folded@-1` (headgram/forms/variants.py).
const formCalled = (name) => {
  const [circuit, folded, offset] = name.match(/^(qk|ov)(-folded)?(?:@(-?\d+))?$/)?.slice(1) ?? [];
  if (!circuit) return name;
  return [`${name}: ${{ qk: "looks for", ov: "moves" }[circuit]}`, folded && "norms folded in", offset && `at offset ${offset}`].filter(Boolean).join(", ");
};
const circuitOf = (stack) => (stack.includes("/") ? stack.split("/")[0] : ""); // stacks are called `{circuit}/{stack}`
const currentStack = () => stackOf(state.model, state.stack);

/** Take over what is wished for, as far as it exists; the rest falls back to what comes first. */
function choose(wish) {
  const among = (values, ...wishes) => wishes.find((each) => values.includes(each)) ?? values[0];
  if (wish.circuit && !wish.stack) wish = { ...wish, stack: `${wish.circuit}/${state.stack?.split("/").at(-1)}` };
  const forms = wish.circuit ?? wish.stack; // whoever chooses a form with norms folded in means that
  if (forms && !wish.norms) wish = { ...wish, norms: forms.includes("-folded") ? "folded" : "raw" };
  Object.assign(state, wish);
  const names = Object.keys(index.models);
  state.model = among(names, state.model);
  state.stack = among(Object.keys(index.models[state.model]), state.stack);
  state.circuit = circuitOf(state.stack);
  const stack = currentStack();
  state.layer = among(stack.layer_indices, Number(state.layer));
  state.head = Math.min(Math.max(Math.trunc(Number(state.head)) || 0, 0), stack.heads - 1);
  state.column = among(offered().map((column) => column.name), state.column);
  state.form = among(Object.keys(index.forms), state.form);
  state.offset = state.offset === undefined || Number.isNaN(Number(state.offset)) ? undefined : Number(state.offset);
  state.steps = among(["heads", "median", "first", "previous", ...Object.keys(index.layer_columns)], state.steps);
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

/** Whether what is known of a model, its name, lineage and labels, holds every word of the filter. */
function isWanted(name) {
  const { lineage, labels } = Object.values(index.models[name])[0];
  const known = `${name} ${lineage ?? ""} ${labels ?? ""}`.toLowerCase();
  return element("filter").value.toLowerCase().split(/\s+/).every((word) => known.includes(word));
}

function drawControls() {
  const stack = currentStack();
  const numbers = (count) => [...Array(count).keys()].map((i) => [i, i]);
  const names = Object.keys(index.models);
  element("filter").hidden = names.length <= COMPARED;
  fill("model", inOrder(names).filter((name) => name === state.model || isWanted(name)).map((name) => [name, name]));
  const places = Object.keys(index.models[state.model]);
  const circuits = [...new Set(places.map(circuitOf))];
  fill("circuit", circuits.map((name) => [name, formCalled(name)]));
  element("circuits").hidden = circuits.length === 1 && !circuits[0];
  fill("stack", places.filter((name) => circuitOf(name) === state.circuit).map((name) => [name, name.split("/").at(-1)]));
  fill("layer", stack.layer_indices.map((layer) => [layer, layer]));
  fill("head", numbers(stack.heads));
  fill("column", offered().map((column) => [column.name, column.label]));
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
    for (const name of inOrder(names)) {
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
  const { source, revision, commit, twin, measured, version } = index.origins[state.model] ?? {};
  return [twin && `random twin ${twin}: heads turned at random, spectra kept`, source && `source ${source}`, revision && `revision ${revision}`, commit && commit !== revision && `commit ${commit.slice(0, 12)}`,
    `${measured ? `measured ${measured} by ` : ""}headgram ${version ?? index.version}`].filter(Boolean).join(" · ");
}

function drawText(data) {
  const { meta } = data;
  const column = columnOf(state.column);
  const facts = [meta.architecture, `${counted(data.layers.length, "layer")} × ${counted(meta.heads, "head")}`, meta.kv_heads === meta.heads ? null : counted(meta.kv_heads, `${state.circuit.startsWith("ov") ? "value" : "key"} head`),
    `rank ${meta.rank}`, `width ${meta.hidden}`, meta.stored_dtype];
  element("facts").textContent = facts.filter((fact) => fact !== null && fact !== undefined).join(" · ");
  element("origin").textContent = `${state.model} · ${originText()}`;
  element("strip-subject").textContent = `by ${column.label.toLowerCase()}`;
  const { type } = columnColours(data);
  element("strip-note").textContent = `${column.label}${column.meaning && ": "}${column.meaning}. ${type === "log"
    ? "Colours on a logarithmic scale." : "Colours are clipped at the outermost hundredth of heads."}${chanceOf(column.name)
    ? ` By chance: ${show(chanceOf(column.name).mean)} ± ${show(chanceOf(column.name).deviation)}.` : byChance(column.name, state.layer).map((text) => ` In layer ${state.layer} ${text}.`).join("")}`;
  const head = `Head ${state.head} of every layer`;
  element("form-head-caption").textContent = head;
  element("side-head-caption").textContent = head;
  const forms = chanceOf(state.form);
  element("form-note").textContent = `The frame is layer ${state.layer}. By chance 0 ± ${show(forms.deviation)}, and in the mean over heads 0 ± ${show(forms.deviation / Math.sqrt(meta.heads))}. The bar marks the best of all by chance.`;
  const sides = chanceOf(state.side);
  element("side-note").textContent = `How much the spans of the top k = ${meta.directions} directions of two layers share, ‖V_a V_bᵀ‖² / k: 1 for equal spans, and by chance k/d = ${show(sides.mean)} ± ${show(sides.deviation)}.`;
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
  fillTable("values", offered().map((column) => {
    const [value, chance] = [data.headValue(column.name, state.layer, state.head), data.expected(column.name, state.layer)];
    const line = row(pressed(column.label, () => set({ column: column.name })), show(value), Number.isNaN(value) ? "" : bar(data.standing(column.name, value)), chance === undefined ? "" : show(Number(chance.toPrecision(2))));
    line.title = column.meaning;
    line.classList.toggle("current", column.name === state.column);
    return line;
  }));
  const found = data.neighbours(state.measure, state.layer, state.head);
  fillTable("neighbours", found.map(({ layer, head, value }) =>
    row(pressed(`L${layer} H${head}`, () => set({ layer, head }), `layer ${layer}, head ${head}`), show(value), bar(Math.abs(value), value < 0 ? "negative" : ""))));
  if (!found.length) fillTable("neighbours", [row("None was measured.")]);
}

/** The tokens at both ends of the chosen head's first directions. */
function drawTokens(data) {
  const found = data.tokens(state.layer, state.head);
  element("tokens").hidden = !found.length;
  element("tokens-note").hidden = !found.length;
  if (!found.length) return;
  const sides = state.circuit.startsWith("ov") ? { right: "Reads", left: "Writes" } : { right: "Looks with", left: "Looks for" };
  fillTable("tokens", found.map(({ side, direction, share, ends }) => row(`${sides[side]} ${direction + 1}`,
    ...ends.flatMap(({ texts, deviations }) => [words(texts), show(deviations)]), show(share))));
  element("tokens-note").textContent = `Tokens whose row of the embedding, or of the output matrix, projects most on a direction; beside them the outermost projection in deviations, ± ${show(data.words.chance)} by chance, and the share of all rows' energy along the direction, ${show(1 / data.meta.hidden)} by chance. The two ends of a direction are no more than opposite.`;
}

/** Texts of tokens, which may be a stranger's: blanks and signs of control are to be seen, and none turns round what follows. */
function words(texts) {
  const cell = document.createElement("span");
  cell.className = "words";
  cell.append(...texts.flatMap((text) => {
    const word = document.createElement("bdi");
    word.textContent = text.replaceAll(" ", "␣").replace(/[\p{C}\p{Z}]/gu, (sign) => `\\u${sign.codePointAt(0).toString(16).padStart(4, "0")}`);
    return [word, " "];
  }));
  return cell;
}

/** Those of an array of strongest partners that are the chosen head's: of its own stack, or of another one, which has a name. */
function partners(data, found, name) {
  if (!found) return [];
  const stack = name ? Object.keys(index.models[state.model]).find((place) => place.endsWith(`/${name}`)) : state.stack;
  const { shape: [, layers, heads, count], data: values } = found;
  const [size, start] = [layers * heads * count, (data.position(state.layer) * heads + state.head) * count];
  return Array.from({ length: count }, (_, i) => start + i).filter((i) => values[2 * size + i] > 0).map((i) => ({
    layer: stackOf(state.model, stack).layer_indices[values[i]], head: values[size + i], value: values[2 * size + i], stack, of: name ? `${name}, ` : "",
  }));
}

/** The strongest feeders or readers of the chosen head. */
function drawFeeding(data) {
  element("card-feeding").hidden = !["q", "k", "v"].some((kind) => data.feeding(kind)) && !data.partner;
  element("feeding-subject").textContent = `layer ${state.layer}, head ${state.head}`;
  for (const side of ["feeders", "readers"]) {
    const found = [...partners(data, data.feeding(`${state.kind}/${side}`)), ...partners(data, data.across(`${state.kind}/${side}`), data.partner)];
    const rows = found.sort((a, b) => b.value - a.value).slice(0, 8).map(({ layer, head, value, stack, of }) => row(
      pressed(`${of}L${layer} H${head}`, () => set({ stack, layer, head }), `${of}layer ${layer}, head ${head}`), show(value), bar(value / Math.sqrt(data.meta.hidden))));
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
  drawTokens(data);
  drawFeeding(data);
  const turned = drawPositions(data);
  for (const picture of pictures) {
    if (outdated) return;
    if (!turned && [turns, waves].some(({ label }) => label === picture.label)) continue;
    await picture.draw(data);
    if (!performance.getEntriesByName("first-picture").length) performance.mark("first-picture");
  }
  if (!outdated) await drawSteps(data);
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
  stepsPictureDrawn = new Picture("course", "steps", stepsPicture);
  for (const id of ["model", "circuit", "stack", "layer", "head", "column", "form", "steps", "norms", ...SELECTS]) {
    element(id).addEventListener("change", (event) => set({ [id]: event.target.value }));
  }
  element("offset").addEventListener("input", (event) => {
    replaces = true;
    set({ offset: stacks.get(JSON.stringify(inStack())).turning.offsets[event.target.value] });
  });
  element("filter").addEventListener("input", drawControls);
  element("theme").addEventListener("click", () => set({ theme: themeName() === "dark" ? "light" : "dark" }));
  element("compare").addEventListener("keydown", (event) => { if (event.key === "Escape") element("compare").open = false; });
  document.addEventListener("click", (event) => { if (!element("compare").contains(event.target)) element("compare").open = false; });
  for (const medium of [prefersDark, prints]) medium.addEventListener("change", draw);
  addEventListener("hashchange", () => { replaces = true; return set(readAddress()); });
  addEventListener("scroll", () => showTip(null, null), { passive: true });
  return set(readAddress());
}

const pictureOf = (id) => [...pictures, stepsPictureDrawn].find((picture) => picture.id === id);

// What a script beside the page calls, and what a test or a console may ask.
globalThis.headgram = {
  receive: (name, text) => awaited.get(name)(text),
  state,
  set,
  settled: async () => { while (drawing) await drawing; },
  rows: (id, set) => pictureOf(id).view.data(set),
  matrix: () => {
    const { rows, columns, value } = pictures.find((picture) => picture.id === "matrix").shown;
    return { rows, columns, values: rows.map((_, i) => columns.map((_, j) => value(i, j))) };
  },
  view: (id) => pictureOf(id).view,
};

headgram.started = start();
