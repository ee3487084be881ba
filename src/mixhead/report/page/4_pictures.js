// Pictures with a patch for each token, for the chosen layer and time step.
function drawPicture(place, picture) {
  const canvas = make("canvas", { width: 8, height: 8 });
  const frame = make("div", { className: "frame", role: "group", tabIndex: 0 }, canvas);
  const caption = make("figcaption"), source = D.pictures[picture];
  if (source) frame.prepend(make("img", { src: source, alt: "" }));
  else frame.style.aspectRatio = "1";
  place.append(make("figure", {}, frame, caption));
  let shown = null, cursor = 0;

  function find() {
    const axis = axisOf(state.layer), mine = axis.sequences.filter((s) => s.picture === picture);
    return mine.find((s) => s.time === D.times[state.time]) ?? mine[0];
  }
  function paint() {
    shown = find();
    if (!shown) return void (caption.textContent = "not seen by this layer");
    const [rows, columns] = shown.grid, pen = canvas.getContext("2d"), scale = Math.max(8, Math.ceil(448 / columns));
    canvas.width = columns * scale;
    canvas.height = rows * scale;
    for (let i = 0; i < rows * columns; i++) {
      const token = shown.first + shown.prefix + i, x = (i % columns) * scale, y = Math.floor(i / columns) * scale;
      let colour = "transparent", alpha = 0.55;
      if (state.head === null) {
        const head = telling(state.layer, token);
        if (head !== null) colour = headColour(state.layer, head);
      } else if (headsOf(state.layer, token).includes(state.head)) {
        [colour, alpha] = ["#ffd873", 0.3 + 0.45 * weight(state.layer, token, state.head)];
      } else [colour, alpha] = ["#10141a", 0.62];
      pen.globalAlpha = alpha;
      pen.fillStyle = colour;
      pen.fillRect(x + 0.5, y + 0.5, scale - 1, scale - 1);
    }
    if (document.activeElement === frame) {
      pen.globalAlpha = 1;
      pen.lineWidth = Math.max(2, scale / 8);
      pen.strokeStyle = "#ffffff";
      pen.strokeRect((cursor % columns) * scale + 2, Math.floor(cursor / columns) * scale + 2, scale - 4, scale - 4);
    }
    caption.textContent = `${shown.title}, ${rows} × ${columns} patches`;
    frame.setAttribute("aria-label", `${shown.title}: ${rows} by ${columns} patches. Arrow keys move from patch to patch.`);
  }
  function point(i) {
    if (!shown) return;
    const [rows, columns] = shown.grid;
    cursor = Math.max(0, Math.min(rows * columns - 1, i));
    describe(D.layers[state.layer].axis, shown.first + shown.prefix + cursor,
      `row ${Math.floor(cursor / columns) + 1}, column ${(cursor % columns) + 1}`, shown.title);
    paint();
  }
  const at = ({ offsetX, offsetY }) => {
    const [rows, columns] = shown.grid;
    return Math.floor((offsetY / canvas.clientHeight) * rows) * columns + Math.floor((offsetX / canvas.clientWidth) * columns);
  };
  canvas.addEventListener("pointermove", (event) => event.pointerType === "mouse" && shown && point(at(event)));
  canvas.addEventListener("click", (event) => shown && point(at(event)));
  frame.addEventListener("keydown", (event) => {
    const columns = shown?.grid[1] ?? 1;
    const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns }[event.key];
    if (!step) return;
    event.preventDefault();
    point(cursor + step);
  });
  frame.addEventListener("focus", paint);
  frame.addEventListener("blur", paint);
  paint();
  const view = (change) => ("layer" in change || "head" in change || "time" in change) && paint();
  views.push(view);
  return () => views.splice(views.indexOf(view), 1);
}

function drawTokens() {
  const place = byId("flow"), gallery = make("div", { className: "pictures" });
  const pictures = new Set();
  D.axes.forEach((axis, number) => {
    if (axis.kind === "text") axis.sequences.forEach((sequence) => drawText(place, number, sequence));
    else axis.sequences.forEach((sequence) => pictures.add(sequence.picture));
  });
  if (!pictures.size) return;
  place.append(gallery);
  pictures.forEach((picture) => drawPicture(gallery, picture));
}
