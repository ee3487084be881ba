// Bars of loads by group, and words by head, for the chosen layer.
function groupColours(count, ordered) {
  return [...Array(count).keys()].map((i) => (ordered || count > FEW.length ? mix(MANY, i / Math.max(count - 1, 1)) : FEW[i]));
}

function drawGroups() {
  const select = byId("label"), labels = [...new Set(D.groups.map((group) => group.label))];
  if (!labels.length) return void (byId("groups").hidden = true);
  select.append(...labels.map((label) => make("option", { value: label, textContent: label })));
  function paint() {
    const groups = D.groups.filter((group) => group.label === select.value && group.load[state.layer]);
    const { heads } = D.layers[state.layer], ordered = ["position", "time_step"].includes(select.value);
    const colours = groupColours(groups.length, ordered);
    const bar = Math.max(4, Math.min(16, 640 / (heads * groups.length + heads))), block = bar * (groups.length + 1);
    const [left, top, height] = [40, 8, 180], width = left + block * heads;
    const svg = vector("svg", { width, height: height + 30, role: "img",
      "aria-label": `Load of each head of ${layerName(state.layer)} by ${select.value}; the same numbers are in the table below.` });
    for (const share of [0, 0.25, 0.5, 0.75, 1]) {
      const y = top + height * (1 - share) - top * (1 - share);
      svg.append(vector("line", { class: "grid", x1: left, x2: width, y1: y, y2: y }));
      const text = vector("text", { x: left - 6, y: y + 4, "text-anchor": "end" });
      text.textContent = percent(share);
      svg.append(text);
    }
    const yOf = (share) => height - (height - top) * share;
    for (let head = 0; head < heads; head++) {
      groups.forEach((group, g) => {
        const share = group.load[state.layer][head], [low, high] = group.band[state.layer][head];
        const x = left + block * head + bar * (g + 0.5), title = vector("title");
        title.textContent = `head ${head}, ${group.value}: ${percent(share)}`;
        svg.append(vector("rect", { x, y: yOf(share), width: bar - 1, height: height - yOf(share), fill: colours[g] }, title));
        if (low !== null && bar > 4) {
          svg.append(vector("line", { class: "whisker", x1: x + bar / 2, x2: x + bar / 2, y1: yOf(low), y2: yOf(high) }));
        }
      });
      const text = vector("text", { x: left + block * (head + 0.5), y: height + 18, "text-anchor": "middle" });
      text.textContent = head;
      svg.append(text);
    }
    const counted = ({ tokens, blocks }) => `${tokens.toLocaleString("en")} tokens, ${blocks.toLocaleString("en")} ${D.observations.split(" ")[0]}`;
    const legend = make("div", { className: "legend" });
    groups.forEach((group, g) => {
      const swatch = make("span", { className: "swatch" });
      swatch.style.background = colours[g];
      legend.append(make("span", {}, swatch, `${group.value} (${counted(group)})`));
    });
    const table = make("table", { className: "map" }), header = make("tr", {}, make("th", { textContent: "head", scope: "col" }));
    for (let head = 0; head < heads; head++) header.append(make("th", { textContent: head, scope: "col" }));
    table.append(make("thead", {}, header));
    const body = make("tbody");
    for (const group of groups) {
      const row = make("tr", {}, make("th", { textContent: group.value, scope: "row" }));
      group.load[state.layer].forEach((share) => row.append(make("td", { className: "even", textContent: Math.round(100 * share) })));
      body.append(row);
    }
    table.append(body);
    const details = make("details", {}, make("summary", { textContent: "The numbers" }), table);
    details.open = byId("chart").querySelector("details")?.open ?? false;
    byId("chart").replaceChildren(make("h3", { textContent: `Layer ${D.layers[state.layer].short}` }), legend, svg, details);
  }
  select.addEventListener("change", paint);
  views.push((change) => "layer" in change && paint());
  paint();
}

function drawWords() {
  if (!D.words.length) return void (byId("words").hidden = true);
  function paint() {
    const list = make("dl", { className: "words" });
    (D.words[state.layer] ?? []).forEach((words, head) => {
      const item = make("dd");
      words.forEach(([word, bits]) => item.append(
        make("span", { className: "word" }, make("span", { textContent: word, dir: "auto" }), " ", make("small", { textContent: bits.toFixed(2) })), " "));
      if (!words.length) item.append(make("small", { textContent: "no word stands out" }));
      list.append(make("dt", { textContent: `head ${head}` }), item);
    });
    byId("word-list").replaceChildren(make("h3", { textContent: `Layer ${D.layers[state.layer].short}` }), list);
  }
  views.push((change) => "layer" in change && paint());
  paint();
}
