// Pictures as files: SVG and PNG with a heading that says what they show, CSV with the rows that they draw.

const HEADING = { font: 13, line: 18, margin: 12 };

function download(name, type, content) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([content], { type }));
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}

/** Lines of a text that fit into so many pixels. */
function wrapped(text, width, font) {
  const context = document.createElement("canvas").getContext("2d");
  context.font = font;
  const lines = [""];
  for (const word of text.split(" ")) {
    const longer = `${lines.at(-1)} ${word}`.trim();
    if (lines.at(-1) && context.measureText(longer).width > width) lines.push(word);
    else lines[lines.length - 1] = longer;
  }
  return lines;
}

/** The heading of a picture that is so wide: its lines with their style, and its height. */
function heading(title, origin, width) {
  const { font, line, margin } = HEADING;
  const lines = [[title, `600 ${font}px ${FONT}`], [origin, `400 ${font - 1}px ${FONT}`]].flatMap(([text, style]) =>
    wrapped(text, width - 2 * margin, style).map((part) => ({ text: part, style })));
  return { lines: lines.map((each, i) => ({ ...each, y: margin + (i + 0.8) * line })), height: 2 * margin + lines.length * line };
}

const escaped = (text) => text.replace(/[&<>"]/g, (character) => `&#${character.charCodeAt(0)};`);

const SAVERS = {
  async SVG(view, title, origin) {
    const inner = await view.toSVG();
    const [, width, height] = inner.match(/width="([\d.]+)" height="([\d.]+)"/).map(Number);
    const above = heading(title, origin, width);
    const texts = above.lines.map(({ text, style, y }) =>
      `<text x="${HEADING.margin}" y="${y}" fill="${theme().ink}" style="font: ${escaped(style)}">${escaped(text)}</text>`);
    const whole = `width="${width}" height="${height + above.height}"`;
    return ["image/svg+xml", `<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" ${whole}>`
      + `<title>${escaped(title)}</title><rect ${whole} fill="${theme().halo}"/>${texts.join("")}`
      + `${inner.replace("<svg", `<svg y="${above.height}"`)}</svg>`];
  },

  async PNG(view, title, origin) {
    const scale = 2;
    const inner = await view.toCanvas(scale);
    const above = heading(title, origin, inner.width / scale);
    const canvas = Object.assign(document.createElement("canvas"), { width: inner.width, height: inner.height + scale * above.height });
    const context = canvas.getContext("2d");
    context.fillStyle = theme().halo;
    context.fillRect(0, 0, canvas.width, canvas.height);
    context.drawImage(inner, 0, scale * above.height);
    context.scale(scale, scale);
    context.fillStyle = theme().ink;
    for (const { text, style, y } of above.lines) {
      context.font = style;
      context.fillText(text, HEADING.margin, y);
    }
    return ["image/png", await new Promise((resolve) => canvas.toBlob(resolve, "image/png"))];
  },

  /** Every row with what it is a row of. */
  async CSV(view, title, origin, rows) {
    const cell = (value) => (typeof value === "number" ? String(Number(value.toPrecision(6))) : `"${String(value).replaceAll('"', '""')}"`);
    const facts = { model: state.model, stack: state.stack, picture: title, origin };
    const lines = rows.map((row) => Object.values({ ...facts, ...row }).map(cell).join(","));
    return ["text/csv", `${[Object.keys({ ...facts, ...rows[0] }).join(","), ...lines].join("\r\n")}\r\n`];
  },
};

/** Buttons that save a picture, for a place beside it. */
function saveButtons(picture) {
  const place = Object.assign(document.createElement("div"), { className: "saves" });
  for (const [format, make] of Object.entries(SAVERS)) {
    const button = Object.assign(document.createElement("button"), { type: "button", textContent: format });
    button.setAttribute("aria-label", `Save the picture ${picture.id} as ${format}`);
    button.addEventListener("click", async () => {
      const name = `${state.model}-${state.stack.replace("/", "-")}-${picture.id}.${format.toLowerCase()}`;
      download(name, ...(await make(picture.view, picture.label(picture.data), `${state.model}, ${state.stack} · ${originText()}`, picture.rows())));
    });
    place.append(button);
  }
  return place;
}
