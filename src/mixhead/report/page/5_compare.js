// Two groups of tokens: how their loads differ, and whether that is more than chance.
function pValue(z) {
  // Twice the upper tail of the normal distribution, by the rational approximation 7.1.26 of Abramowitz and Stegun.
  const x = z / Math.SQRT2, t = 1 / (1 + 0.3275911 * x);
  const poly = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))));
  return poly * Math.exp(-x * x);
}

/* Benjamini and Hochberg's adjustment: below 0.05, at most 5% of what is called different is chance. */
function adjusted(values) {
  const order = values.map((p, i) => [p, i]).filter(([p]) => p !== null).sort((a, b) => b[0] - a[0]);
  const found = values.map(() => null);
  let least = 1;
  order.forEach(([p, i], k) => (found[i] = least = Math.min(least, (p * order.length) / (order.length - k))));
  return found;
}

function differences(a, b) {
  const found = [];
  D.layers.forEach((layer, l) => {
    if (!a.load[l] || !b.load[l]) return;
    for (let head = 0; head < layer.heads; head++) {
      const by = a.load[l][head] - b.load[l][head], [ea, eb] = [a.error[l][head], b.error[l][head]];
      const p = ea === null || eb === null ? null : by === 0 ? 1 : pValue(Math.abs(by) / Math.hypot(ea, eb));
      found.push({ layer: l, head, by, p });
    }
  });
  adjusted(found.map((d) => d.p)).forEach((q, i) => (found[i].sure = q !== null && q < 0.05));
  return found;
}

function drawCompare() {
  const [first, second] = [byId("first"), byId("second")];
  if (D.parts.length < 2) return void (byId("compare").hidden = true);
  for (const select of [first, second]) {
    const kinds = new Map();
    D.parts.forEach((part, i) => {
      if (!kinds.has(part.kind)) kinds.set(part.kind, make("optgroup", { label: part.kind }));
      kinds.get(part.kind).append(make("option", { value: i, textContent: part.name }));
    });
    select.append(...kinds.values());
  }
  // The first two parts of one kind, so that the page opens with a comparison that says something.
  const kind = D.parts.find((part, i) => i && D.parts[i + 1]?.kind === part.kind)?.kind;
  const pair = kind ? D.parts.map((part, i) => (part.kind === kind ? i : -1)).filter((i) => i >= 0) : [0, 1];
  [first.value, second.value] = pair;

  let found = new Map(), widest = 0.1, forget = [];
  const cellOf = (layer, head) => {
    const d = found.get(`${layer}/${head}`);
    if (!d) return { text: "", colour: ramp("same")[0], label: "not in both" };
    const points = Math.round(100 * d.by);
    const text = `${points > 0 ? "+" : points < 0 ? "−" : ""}${Math.abs(points)}`;
    return {
      text,
      colour: mix(ramp("less", "same", "more"), 0.5 + d.by / widest / 2),
      className: d.sure ? "sure" : "",
      label: `${layerName(layer)}, head ${head}: ${text} points, first minus second${d.sure ? ", significant" : ""}`,
    };
  };
  const paint = drawMap(byId("difference"), "Load in the first minus load in the second", cellOf);
  drawLegend(byId("difference-legend"), ["less", "same", "more"], "more in the second", "more in the first",
    "Percentage points. Bold and underlined: significant, with at most 5% false discoveries.");

  function update() {
    const [a, b] = [D.parts[first.value], D.parts[second.value]], all = differences(a, b);
    found = new Map(all.map((d) => [`${d.layer}/${d.head}`, d]));
    widest = Math.max(0.1, ...all.map((d) => Math.abs(d.by)));
    const sure = all.filter((d) => d.sure), top = [...all].sort((x, y) => Math.abs(y.by) - Math.abs(x.by))[0];
    const tested = all.filter((d) => d.p !== null).length;
    byId("verdict").textContent = !top ? "No layer saw both." :
      (tested ? `${sure.length} of ${tested} heads differ significantly. ` : "Too few tokens for a test of significance. ") +
      `The largest difference: head ${top.head} of ${layerName(top.layer)}, used by ${percent(a.load[top.layer][top.head])} ` +
      `of the first and ${percent(b.load[top.layer][top.head])} of the second.`;
    paint();
    forget.forEach((end) => end());
    const sides = byId("sides");
    sides.replaceChildren();
    forget = [a, b].filter((part) => part.sequence).map((part) => {
      const side = sides.appendChild(make("div"));
      const [axis, number] = part.sequence, sequence = D.axes[axis].sequences[number];
      return D.axes[axis].kind === "text" ? drawText(side, axis, sequence) : drawPicture(side, sequence.picture);
    });
  }
  first.addEventListener("change", update);
  second.addEventListener("change", update);
  update();
}
