// Layers from left to right, heads from top to bottom; one cell for each head, and keys to walk.
function drawMap(place, name, cellOf, rows = []) {
  const most = Math.max(...D.layers.map((layer) => layer.heads));
  const table = make("table", { className: "map", role: "grid", "aria-label": name });
  const top = make("tr", {}, make("th", { scope: "col", textContent: "head" }));
  D.layers.forEach((layer) => top.append(make("th", { scope: "col", textContent: layer.short, title: layer.name })));
  table.append(make("thead", {}, top));
  const body = make("tbody"), cells = [];
  for (let head = 0; head < most; head++) {
    const row = make("tr", {}, make("th", { scope: "row", textContent: head }));
    D.layers.forEach((layer, i) => {
      const cell = make("td", { role: "gridcell" });
      if (head < layer.heads) {
        cells.push({ cell, layer: i, head });
        Object.assign(cell, { _layer: i, _head: head, tabIndex: -1 });
        cell.setAttribute("aria-selected", "false");
      } else cell.className = "none";
      row.append(cell);
    });
    body.append(row);
  }
  for (const [title, values] of rows) {
    const row = make("tr", {}, make("th", { scope: "row", textContent: title }));
    values.forEach((value) => row.append(make("td", { role: "gridcell", className: "even", textContent: value })));
    body.append(row);
  }
  table.append(body);
  place.replaceChildren(table);

  function paint() {
    for (const { cell, layer, head } of cells) {
      const { text, colour, label, className } = cellOf(layer, head);
      cell.textContent = text;
      cell.className = className ?? "";
      cell.style.background = colour;
      cell.style.color = inkOn(colour);
      cell.title = label;
      cell.setAttribute("aria-label", label);
    }
    mark();
  }
  function mark() {
    for (const { cell, layer, head } of cells) {
      const chosen = layer === state.layer && head === state.head;
      cell.setAttribute("aria-selected", chosen);
      cell.tabIndex = layer === state.layer && head === (state.head ?? 0) ? 0 : -1;
    }
    [...top.children].forEach((cell, i) => cell.classList.toggle("here", i - 1 === state.layer));
  }
  const cellAt = (layer, head) => cells.find((c) => c.layer === layer && c.head === head)?.cell;
  table.addEventListener("click", ({ target }) => {
    if (target._layer === undefined) return;
    const again = target._layer === state.layer && target._head === state.head;
    choose({ layer: target._layer, head: again ? null : target._head });
  });
  table.addEventListener("keydown", (event) => {
    const { target, key } = event;
    if (target._layer === undefined) return;
    if (key === "Enter" || key === " ") target.click();
    else {
      const [x, y] = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[key] ?? [0, 0];
      const next = (x || y) && cellAt(target._layer + x, target._head + y);
      if (!next) return;
      target.tabIndex = -1;
      next.tabIndex = 0;
      next.focus();
    }
    event.preventDefault();
  });
  paint();
  views.push((change) => ("theme" in change ? paint() : mark()));
  return paint;
}

function drawLegend(place, names, from, to, ...notes) {
  const bar = make("span", { className: "ramp" });
  const colour = () => (bar.style.background = `linear-gradient(to right, ${ramp(...names).join(", ")})`);
  colour();
  views.push((change) => "theme" in change && colour());
  place.replaceChildren(make("span", {}, from, bar, to), ...notes.map((note) => make("span", { textContent: note })));
}

function drawLoads() {
  const cellOf = (layer, head) => {
    const { load, band, shared } = D.layers[layer], always = shared.includes(head);
    const between = band[head][0] === null ? "" : `, 95% band ${percent(band[head][0])} to ${percent(band[head][1])}`;
    const text = String(Math.round(100 * load[head]));
    return {
      text,
      colour: mix(ramp("low", "middle", "high"), load[head]),
      className: always ? "shared" : "",
      label: `${layerName(layer)}, head ${head}: ${text}% of the tokens${always ? ", shared by all" : between}`,
    };
  };
  const even = D.layers.map((layer) => layer.entropy.toFixed(2).replace(/^0/, ""));
  const spread = D.layers.map((layer) => layer.cv.toFixed(2).replace(/^0/, ""));
  drawMap(byId("map"), "Load of every head of every layer", cellOf, [["evenness", even], ["variation", spread]]);
  drawLegend(byId("map-legend"), ["low", "middle", "high"], "0%", "100%",
    "Evenness: entropy of the loads, 1 where all competing heads are used alike.",
    "Variation: their standard deviation over their mean.");
}
