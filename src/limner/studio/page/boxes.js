// Named boxes on a canvas: drag to make one, drag it to move it, drag a corner to resize it; arrow keys do the same.
// In a `gr.HTML`. props: names and colours of the classes, rows and columns of the picture.
// props.value: [[class, x, y, w, h], ...], x, y the left upper corner, all in 0..1: what the HTTP API takes.
const { names, colours, rows, columns } = props;
const LEAST = 0.02, STEP = 0.02;
const field = make("div", { class: "limner-field", role: "group", "aria-label": "Boxes; drag to make one" });
field.style.aspectRatio = `${columns} / ${rows}`;
const kind = make("select", { "aria-label": "Class of the box" }, ...names.map((name) => make("option", {}, name)));
const add = make("button", { type: "button" }, "Add a box");
const remove = make("button", { type: "button" }, "Delete the box");
const json = make("code", { class: "limner-json", tabindex: 0, role: "region", "aria-label": "boxes as JSON" });
const help = make("p", { class: "limner-help" }, "Drag to make a box, to move it, or its corners to resize it. "
  + "By keyboard: arrows move, with Shift they resize, Delete deletes.");
element.replaceChildren(make("div", { class: "limner-boxes-in" }, field,
  make("div", { class: "limner-bar" }, make("label", {}, "Class", kind), add, remove), help,
  make("details", {}, make("summary", {}, "As JSON for the API"), json)));

let boxes = [], chosen = -1, drag = null;
const clamp = (value, low, high) => Math.min(high, Math.max(low, value));
const near = (value) => Math.round(value * 1e4) / 1e4;
const rounded = ([x, y, w, h]) => [near(x), near(y), near(near(x + w) - near(x)), near(near(y + h) - near(y))];
const colour = (name) => colours[Math.max(0, names.indexOf(name))];

function show() {
  field.replaceChildren(...boxes.map(([name, x, y, w, h], k) => {
    const [left, top, width, height] = [x, y, w, h].map((share) => `${Math.round(100 * share)}%`);
    const said = `${name}: left ${left}, top ${top}, ${width} by ${height}`;
    const corners = ["nw", "ne", "sw", "se"].map((corner) => make("i", { "data-corner": corner }));
    const state = { "aria-label": said, "aria-pressed": k === chosen };
    const box = make("div", { class: "limner-box", tabindex: 0, role: "button", ...state }, make("span", {}, name),
      ...corners);
    const sides = { left: x, top: y, width: w, height: h };
    for (const [side, value] of Object.entries(sides)) box.style[side] = `${100 * value}%`;
    box.style.setProperty("--limner-colour", colour(name));
    box.onfocus = () => { if (!drag) choose(k); };
    box.onkeydown = (event) => key(event, k);
    return box;
  }));
  remove.disabled = chosen < 0;
  json.textContent = JSON.stringify(boxes);
}

function choose(k) {
  if (chosen === k) return;
  chosen = k;
  if (boxes[k]) kind.value = boxes[k][0];
  [...field.children].forEach((box, n) => box.setAttribute("aria-pressed", n === k));
  remove.disabled = k < 0;
}

function tell(focus) {
  show();
  props.value = boxes.map((box) => [...box]);
  if (focus) field.children[chosen]?.focus();
}

// The span (x, y, w, h) as `dx`, `dy` and a corner ("nw", ..., or "" for all of it) change it, kept on the canvas.
function moved([x, y, w, h], dx, dy, corner) {
  if (!corner) return [clamp(x + dx, 0, 1 - w), clamp(y + dy, 0, 1 - h), w, h];
  let [left, top, right, bottom] = [x, y, x + w, y + h];
  if (corner.includes("w")) left = clamp(left + dx, 0, right - LEAST); else right = clamp(right + dx, left + LEAST, 1);
  if (corner.includes("n")) top = clamp(top + dy, 0, bottom - LEAST); else bottom = clamp(bottom + dy, top + LEAST, 1);
  return [left, top, right - left, bottom - top];
}

function key(event, k) {
  const move = { ArrowLeft: [-STEP, 0], ArrowRight: [STEP, 0], ArrowUp: [0, -STEP], ArrowDown: [0, STEP] }[event.key];
  if (event.key === "Delete" || event.key === "Backspace") discard(k);
  else if (move) {
    boxes[k] = [boxes[k][0], ...rounded(moved(boxes[k].slice(1), ...move, event.shiftKey ? "se" : ""))];
    tell(true);
  } else return;
  event.preventDefault();
}

function discard(k) {
  if (k < 0) return;
  boxes.splice(k, 1);
  chosen = Math.min(k, boxes.length - 1);
  tell(true);
}

function at(event) {
  const area = field.getBoundingClientRect();
  return [clamp((event.clientX - area.left) / area.width, 0, 1), clamp((event.clientY - area.top) / area.height, 0, 1)];
}

field.onpointerdown = (event) => {
  if (event.button) return;
  event.preventDefault();
  const box = event.target.closest(".limner-box"), from = at(event);
  if (box) {
    choose([...field.children].indexOf(box));
    drag = { from, span: boxes[chosen].slice(1), corner: event.target.dataset.corner ?? "" };
  } else {
    boxes.push([kind.value, clamp(from[0], 0, 1 - LEAST), clamp(from[1], 0, 1 - LEAST), LEAST, LEAST]);
    choose(boxes.length - 1);
    drag = { from, span: boxes[chosen].slice(1), corner: "new" };
  }
  field.setPointerCapture(event.pointerId);
  show();
};
field.onpointermove = (event) => {
  if (!drag) return;
  const [x, y] = at(event), [fromX, fromY] = drag.from;
  const span = drag.corner === "new"
    ? moved([Math.min(fromX, x, 1 - LEAST), Math.min(fromY, y, 1 - LEAST), Math.abs(x - fromX), Math.abs(y - fromY)],
      0, 0, "se")
    : moved(drag.span, x - fromX, y - fromY, drag.corner);
  boxes[chosen] = [boxes[chosen][0], ...rounded(span)];
  show();
};
field.onpointerup = field.onpointercancel = () => {
  if (!drag) return;
  const [, , , w, h] = boxes[chosen];
  if (drag.corner === "new" && w <= LEAST && h <= LEAST) { boxes.pop(); chosen = -1; }
  drag = null;
  tell(true);
};
kind.onchange = () => { if (boxes[chosen]) { boxes[chosen][0] = kind.value; tell(); } };
add.onclick = () => { boxes.push([kind.value, 0.25, 0.25, 0.5, 0.5]); chosen = boxes.length - 1; tell(true); };
remove.onclick = () => discard(chosen);

function read() {
  boxes = (props.value ?? []).map((box) => [...box]);
  chosen = -1;
  show();
}
watch("value", read);
read();
