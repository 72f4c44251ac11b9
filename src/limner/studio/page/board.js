// A canvas of cells, each of one class: brush, flood fill, undo; by mouse, finger or keyboard. In a `gr.HTML`.
// props: rows and columns of an empty canvas; names, colours (#rrggbb, or "" for none) and numbers of the classes,
// the last of which is nothing; start, the place of the brush's first class; opacity of the paint over a picture.
// props.value: null for nothing told, or {rows, columns, cells: base64 of a byte a cell, row by row, picture: data
// URL of what lies below, or null}.
const { names, colours, numbers, opacity, start } = props;
const group = (window.limnerBoards = (window.limnerBoards ?? 0) + 1);
const choice = (kind, value, text, chosen, ...mark) => {
  const input = make("input", { type: "radio", name: `limner-${kind}-${group}`, value });
  input.checked = chosen;
  return make("label", {}, input, ...mark, text);
};

const canvas = make("canvas", {
  tabindex: 0, role: "application", "aria-roledescription": "canvas",
  "aria-label": `${props.said}; arrow keys move, space paints`,
});
const classes = make("fieldset", { class: "limner-palette" }, make("legend", {}, props.legend));
names.forEach((name, k) => {
  const mark = make("span", { class: "limner-mark" });
  mark.style.background = colours[k] ?? "";
  classes.append(choice("class", k, name, k === start, mark));
});
const tools = make("fieldset", { class: "limner-tools" }, make("legend", {}, "Tool"),
  choice("tool", "brush", "Brush", true), choice("tool", "fill", "Fill", false));
const width = make("input", { type: "range", min: 1, value: 1 });
const undo = make("button", { type: "button" }, "Undo");
const clear = make("button", { type: "button" }, "Fill all");
const bar = make("div", { class: "limner-bar" }, tools, make("label", {}, "Brush width", width), undo, clear);
element.replaceChildren(make("div", { class: "limner-board" }, canvas, make("div", {}, classes, bar)));

let rows = 0, columns = 0, count = 0, cells = new Uint8Array(0), ground = null, cursor = null, last = null;
const past = [];
const chosen = (kind) => element.querySelector(`input[name="limner-${kind}-${group}"]:checked`).value;
const rgb = colours.map((colour) => colour && [1, 3, 5].map((k) => parseInt(colour.slice(k, k + 2), 16)));
const place = new Map(numbers.map((number, k) => [number, k]));

function show() {
  const pen = canvas.getContext("2d", { willReadFrequently: true });
  pen.clearRect(0, 0, columns, rows);
  if (ground) pen.drawImage(ground, 0, 0, columns, rows);
  const pixels = pen.getImageData(0, 0, columns, rows), data = pixels.data;
  for (let k = 0; k < count; k++) {
    const paint = rgb[place.get(cells[k])];
    const seen = paint ? (ground ? opacity : 1) : 0;
    for (let c = 0; seen && c < 3; c++) data[4 * k + c] = seen * paint[c] + (1 - seen) * data[4 * k + c];
    if (seen) data[4 * k + 3] = 255;
    if (cursor && k === cursor[1] * columns + cursor[0]) {
      for (let c = 0; c < 3; c++) data[4 * k + c] = 255 - data[4 * k + c];
      data[4 * k + 3] = 255;
    }
  }
  pen.putImageData(pixels, 0, 0);
}

function resize(value) {
  ({ rows, columns } = value);
  count = rows * columns;
  [canvas.width, canvas.height] = [columns, rows];
  canvas.style.aspectRatio = `${columns} / ${rows}`;
  const side = Math.max(rows, columns);
  width.max = Math.max(1, Math.ceil(side / 3));
  width.value = Math.max(1, Math.round(side / 10));
}

function read() {
  const value = props.value ?? props;
  if (value.rows !== rows || value.columns !== columns) resize(value);
  cells = new Uint8Array(count).fill(numbers.at(-1));
  if (value.cells) cells = Uint8Array.from(atob(value.cells), (letter) => letter.charCodeAt(0));
  ground = null;
  past.length = 0;
  if (value.picture) {
    const image = new Image();
    image.onload = () => { ground = image; show(); };
    image.src = value.picture;
  }
  show();
}

function tell() {
  let letters = "";
  for (let k = 0; k < count; k += 8192) letters += String.fromCharCode(...cells.subarray(k, k + 8192));
  props.value = { rows, columns, cells: btoa(letters), picture: props.value?.picture ?? null };
}

function keep() {
  past.push(cells.slice());
  if (past.length > 30) past.shift();
}

function dab([x, y]) {
  const size = Number(width.value), number = numbers[chosen("class")], middle = (size - 1) / 2;
  for (let j = 0; j < size; j++) for (let i = 0; i < size; i++) {
    const column = Math.round(x - middle + i), row = Math.round(y - middle + j);
    const inside = size < 3 || (i - middle) ** 2 + (j - middle) ** 2 <= (size / 2) ** 2;
    if (inside && column >= 0 && column < columns && row >= 0 && row < rows) cells[row * columns + column] = number;
  }
}

function flood([x, y]) {
  const from = cells[y * columns + x], to = numbers[chosen("class")];
  const open = from === to ? [] : [y * columns + x];
  while (open.length) {
    const k = open.pop();
    if (cells[k] !== from) continue;
    cells[k] = to;
    if (k % columns) open.push(k - 1);
    if ((k + 1) % columns) open.push(k + 1);
    if (k >= columns) open.push(k - columns);
    if (k + columns < count) open.push(k + columns);
  }
}

function at(event) {
  const box = canvas.getBoundingClientRect();
  const within = (value, most) => Math.min(most - 1, Math.max(0, Math.floor(value)));
  return [within((event.clientX - box.left) / box.width * columns, columns),
    within((event.clientY - box.top) / box.height * rows, rows)];
}

function stroke(to) {
  const [x, y] = last ?? to, steps = Math.max(1, Math.abs(to[0] - x), Math.abs(to[1] - y));
  const between = (start, end, k) => Math.round(start + (end - start) * k / steps);
  for (let k = 0; k <= steps; k++) dab([between(x, to[0], k), between(y, to[1], k)]);
  last = to;
}

function apply(to) {
  keep();
  if (chosen("tool") === "fill") flood(to); else stroke(to);
  show();
}

canvas.onpointerdown = (event) => {
  if (event.button) return;
  canvas.setPointerCapture(event.pointerId);
  cursor = last = null;
  apply(at(event));
};
canvas.onpointermove = (event) => {
  if (!last) return;
  stroke(at(event));
  show();
};
canvas.onpointerup = canvas.onpointercancel = () => { last = null; tell(); };
const moves = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
canvas.onkeydown = (event) => {
  const move = moves[event.key], [x, y] = cursor ?? [columns >> 1, rows >> 1];
  if (!move && event.key !== " " && event.key !== "Enter") return;
  event.preventDefault();
  const within = (value, most) => Math.min(most - 1, Math.max(0, value));
  cursor = move ? [within(x + move[0], columns), within(y + move[1], rows)] : [x, y];
  if (!move) { last = null; apply(cursor); last = null; tell(); }
  show();
};
canvas.onblur = () => { cursor = null; show(); };
undo.onclick = () => { cells = past.pop() ?? cells; show(); tell(); };
clear.onclick = () => { keep(); cells.fill(numbers[chosen("class")]); show(); tell(); };
watch("value", read);
read();
