// The text, each token in the colour of its most telling head, with a strip of all heads beneath.
const STRIP_HEADS = 32;
const patterns = new Map(); // which heads are used, as text -> number of the style rule
const patternStyle = document.head.appendChild(make("style"));

function patternOf(layer, used) {
  const { heads } = D.layers[layer], key = `${heads}:${used.join()}`;
  if (!patterns.has(key)) {
    const name = `b${patterns.size}`, stops = [];
    for (let head = 0; head < heads; head++) {
      const [from, to] = [(100 * head) / heads, (100 * (head + 0.82)) / heads].map((v) => `${v.toFixed(2)}%`);
      const colour = used.includes(head) ? "var(--strip)" : "var(--track)";
      stops.push(`transparent ${from}`, `${colour} ${from} ${to}`, `transparent ${to}`);
    }
    if (heads <= STRIP_HEADS) patternStyle.sheet.insertRule(`.${name}{background-image:linear-gradient(to right,${stops.join()})}`);
    patterns.set(key, name);
  }
  return patterns.get(key);
}

function showPiece(element, text) {
  if (!text.trim()) element.setAttribute("aria-label", text === "" ? "part of the character before" : /\n/.test(text) ? "line break" : "space");
  const mark = { "": "·", "\n": "↵\n", " ": "␣", "\t": "⇥" }[text];
  if (mark !== undefined) element.append(make("span", { className: "mark", textContent: mark }));
  else element.textContent = text;
}

/* A text that can be walked through; it repaints itself when another layer or head is chosen. */
function drawText(place, axisNumber, sequence) {
  const axis = D.axes[axisNumber], { first, count, title } = sequence, spans = [];
  const flow = make("div", { className: "flow", role: "listbox", tabIndex: 0, dir: "auto", "aria-label": `${title}, ${count} tokens` });
  let paragraph = null;
  for (let i = 0; i < count; i++) {
    const text = axis.texts[first + i];
    paragraph ??= flow.appendChild(make("p", { role: "presentation", dir: "auto" }));
    const span = make("span", { className: "t", role: "option" });
    span.setAttribute("aria-selected", "false");
    span._token = i;
    showPiece(span, text);
    spans.push(span);
    paragraph.append(span);
    // The browser lays out only the paragraphs in sight, so there must be many; a sentence's end is a good place.
    if (paragraph.childElementCount >= (/[.!?。]\s*$|\n$/.test(text) ? 120 : 400)) paragraph = null;
  }
  if (!count) flow.append(make("p", { className: "empty", textContent: "There is no token here." }));
  place.append(make("h3", { textContent: title }), flow);

  function paint() {
    // Another axis (the other language of a translation) is no layer of these tokens: they stay plain.
    const mine = D.layers[state.layer].axis === axisNumber;
    const colours = new Map();
    spans.forEach((span, i) => {
      if (!mine) return void ((span.className = "t"), span.style.removeProperty("--c"));
      const used = headsOf(state.layer, first + i);
      let name = `t ${patternOf(state.layer, used)}`;
      if (state.head === null) {
        const head = telling(state.layer, first + i);
        if (!colours.has(head)) colours.set(head, head === null ? "transparent" : headColour(state.layer, head));
        span.style.setProperty("--c", colours.get(head));
      } else {
        span.style.removeProperty("--c");
        if (used.includes(state.head)) name += weight(state.layer, first + i, state.head) > 0.4 ? " lit" : " lit1";
      }
      span.className = span === chosen ? `${name} on` : name;
    });
  }

  let chosen = null;
  function point(i) {
    if (i < 0 || i >= count) return;
    if (chosen) chosen.classList.remove("on"), chosen.setAttribute("aria-selected", "false"), chosen.removeAttribute("id");
    chosen = spans[i];
    chosen.classList.add("on");
    chosen.setAttribute("aria-selected", "true");
    chosen.id = `token-${axisNumber}-${first}`;
    flow.setAttribute("aria-activedescendant", chosen.id);
    describe(axisNumber, first + i, axis.texts[first + i], `token ${i + 1} of ${count}`);
  }
  flow.addEventListener("pointerover", ({ target, pointerType }) => {
    const token = target.closest(".t")?._token;
    if (token !== undefined && pointerType === "mouse") point(token);
  });
  flow.addEventListener("click", ({ target }) => {
    const token = target.closest(".t")?._token;
    if (token !== undefined) point(token);
  });
  flow.addEventListener("keydown", (event) => {
    const at = chosen ? chosen._token : -1;
    const to = { ArrowRight: at + 1, ArrowLeft: at - 1, ArrowDown: at + 10, ArrowUp: at - 10, Home: 0, End: count - 1 }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    point(Math.max(0, Math.min(count - 1, to)));
    chosen?.scrollIntoView({ block: "nearest" });
  });
  paint();
  const view = (change) => ("layer" in change || "head" in change) && paint();
  views.push(view);
  return () => views.splice(views.indexOf(view), 1);
}

/* The panel beside the text: which heads one token used, in every layer of its axis. */
function describe(axisNumber, token, text, where) {
  state.token = { axisNumber, token, text, where };
  const axis = D.axes[axisNumber], size = Math.min(16, Math.floor(224 / axis.layers.length) || 4);
  const most = Math.max(...axis.layers.map((layer) => D.layers[layer].heads)), rowSize = Math.min(12, 240 / most);
  const svg = vector("svg", { width: size * axis.layers.length, height: rowSize * most, role: "img" });
  axis.layers.forEach((layer, x) => {
    for (let head = 0; head < D.layers[layer].heads; head++) {
      const used = uses(axis, token, D.layers[layer].at + head), lit = layer === state.layer && head === state.head;
      svg.append(vector("rect", {
        x: x * size, y: head * rowSize, width: size - 1.5, height: rowSize - 1.5, rx: 1.5,
        fill: used ? (lit ? "var(--lit)" : layer === state.layer ? "var(--accent)" : "var(--strip)") : "var(--track)",
        opacity: used ? 0.35 + 0.65 * weight(layer, token, head) : 1,
      }));
    }
  });
  const lines = [];
  if (D.layers[state.layer].axis === axisNumber) {
    const used = headsOf(state.layer, token);
    lines.push(`In ${layerName(state.layer)} it uses ${used.length === 1 ? "head" : "heads"} ${listing(used)} of ${D.layers[state.layer].heads}.`);
  }
  svg.setAttribute("aria-label", `Heads by layer. ${lines.join(" ")}`);
  const shown = text === "" ? "(part of the character before)" : JSON.stringify(text).slice(1, -1).replaceAll('\\"', '"');
  byId("detail").replaceChildren(
    make("p", { className: "piece", textContent: shown, dir: "auto" }),
    make("p", { className: "hint", textContent: where }),
    svg,
    make("p", { className: "hint", textContent: "Layers from left to right, heads from top to bottom; filled: used." }),
    ...lines.map((line) => make("p", { textContent: line })),
    closing,
  );
  byId("spoken").textContent = `${text}. ${lines.join(" ")}`;
}

const closing = make("button", { type: "button", textContent: "Close", id: "close" });
closing.addEventListener("click", () => {
  state.token = null;
  byId("detail").replaceChildren(make("p", { className: "empty", textContent: "Tap a token to see its heads." }));
});

function drawControls() {
  const slider = byId("layer"), time = byId("time");
  slider.max = D.layers.length - 1;
  slider.addEventListener("input", () => choose({ layer: Number(slider.value) }));
  time.max = D.times.length - 1;
  time.addEventListener("input", () => choose({ time: Number(time.value) }));
  byId("time-control").hidden = D.times.length < 2;
  function paint(change) {
    slider.value = state.layer;
    byId("layer-name").textContent = D.layers[state.layer].short;
    slider.setAttribute("aria-valuetext", D.layers[state.layer].name);
    time.value = state.time;
    byId("time-name").textContent = D.times[state.time] ?? "";
    if (!change || "layer" in change || "head" in change) {
      const { heads, load, shared } = D.layers[state.layer];
      const chips = [];
      for (let head = 0; head < heads; head++) {
        const chip = make("button", { type: "button", "aria-pressed": state.head === head,
          "aria-label": `head ${head}, used by ${percent(load[head])} of the tokens` });
        const dot = make("i");
        dot.style.setProperty("--c", headColour(state.layer, head));
        chip.append(dot, `${head}${shared.includes(head) ? " shared" : ""}`);
        chip.addEventListener("click", () => {
          choose({ head: state.head === head ? null : head });
          byId("heads").children[head].focus();
        });
        chips.push(chip);
      }
      byId("heads").replaceChildren(...chips);
    }
    byId("token-hint").textContent = state.head === null
      ? "A token takes the colour of the rarest head that it used; the strip beneath shows all heads of the layer. " +
        "Choose a head to light up its tokens. Keys: arrows move, [ and ] change the layer, 0 to 9 choose a head, Esc none."
      : `Lit: tokens that use head ${state.head} in ${layerName(state.layer)}, ${percent(D.layers[state.layer].load[state.head])} of all.`;
    if (state.token) describe(state.token.axisNumber, state.token.token, state.token.text, state.token.where);
  }
  views.push(paint);
  paint();
  document.addEventListener("keydown", ({ key, target, ctrlKey, metaKey, altKey }) => {
    if (ctrlKey || metaKey || altKey || target.closest("select")) return;
    if (key === "[") choose({ layer: state.layer - 1 });
    if (key === "]") choose({ layer: state.layer + 1 });
    if (key === "Escape") choose({ head: null });
    if (/^[0-9]$/.test(key) && Number(key) < D.layers[state.layer].heads) choose({ head: Number(key) });
  });
}
