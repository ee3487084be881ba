// Tables of pairs: heads of the chosen layer, and layers.
function drawPairs(place, name, titles, rows, colourOf) {
  const table = make("table", { className: "map pairs", "aria-label": name });
  const top = make("tr", {}, make("td", { className: "none" }));
  titles.forEach((title) => top.append(make("th", { scope: "col", textContent: title })));
  table.append(make("thead", {}, top));
  const body = make("tbody");
  rows.forEach((values, i) => {
    const row = make("tr", {}, make("th", { scope: "row", textContent: titles[i] }));
    values.forEach((value, j) => {
      const cell = make("td", { className: "none" });
      if (i !== j && value !== null) {
        const colour = colourOf(value);
        cell.textContent = String(value).replace("-", "−");
        cell.style.background = colour;
        cell.style.color = inkOn(colour);
      }
      row.append(cell);
    });
    body.append(row);
  });
  table.append(body);
  place.replaceChildren(table);
}

function drawTogether() {
  const several = D.agreement.flat().some((value) => value !== null);
  byId("alike-side").hidden = !several;
  function paint() {
    const { heads, short } = D.layers[state.layer];
    byId("pairs-title").textContent = `Heads of layer ${short}`;
    drawPairs(byId("pairs"), "Correlation of heads", [...Array(heads).keys()], D.together[state.layer],
      (value) => mix(ramp("less", "same", "more"), 0.5 + value / 200));
  }
  function paintLayers() {
    if (several) drawPairs(byId("alike"), "Agreement of layers", D.layers.map((layer) => layer.short), D.agreement,
      (value) => mix(ramp("low", "middle", "high"), value / 100));
  }
  views.push((change) => {
    if ("layer" in change || "theme" in change) paint();
    if ("theme" in change) paintLayers();
  });
  paint();
  paintLayers();
}
