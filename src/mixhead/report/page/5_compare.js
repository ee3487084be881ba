// Two groups of tokens: how their loads differ, and whether that is more than chance.
/* Two-sided tail of Student's t for whole degrees of freedom: Abramowitz and Stegun, 26.7.3 and 26.7.4. */
function tTail(t, freedom) {
  const whole = Math.floor(Math.min(Math.max(freedom, 1), 1000)), odd = whole % 2;
  const angle = Math.atan(t / Math.sqrt(whole)), sine = Math.sin(angle), square = Math.cos(angle) ** 2;
  let term = odd ? Math.cos(angle) : 1, total = 0;
  for (let k = 1 + odd; k < whole; k += 2) {
    total += term;
    term *= (square * k) / (k + 1);
  }
  return Math.max(0, 1 - (odd ? (2 / Math.PI) * (angle + sine * total) : sine * total));
}

/* The p-value of one head, as `difference` of mixhead.report.statistics computes it; null where there are few blocks. */
function pValue(layer, head, ...parts) {
  const groups = parts.map(({ load, error, seen }) => {
    const [tokens, blocks, pairs] = seen[layer];
    return { share: load[layer][head], error: error[layer][head], tokens, blocks, pairs };
  });
  if (groups.some(({ blocks }) => blocks < D.least)) return null;
  if (groups[0].share === groups[1].share) return 1;
  const sum = (value) => value(groups[0]) + value(groups[1]);
  const tokens = sum((g) => g.tokens), share = sum((g) => g.tokens * g.share) / tokens;
  const variance = sum((g) => g.tokens * g.share * (1 - g.share)) / tokens;
  const excess = (sum((g) => (g.tokens * g.error) ** 2) / variance - tokens) / Math.max(sum((g) => g.pairs), 1);
  const alike = variance > 0 ? Math.min(Math.max(excess, 0), 1) : 1;
  const expected = (g) => (share * (1 - share) * (g.tokens + alike * g.pairs)) / g.tokens ** 2;
  const variances = groups.map((g) => Math.max(g.error ** 2, expected(g)));
  const total = variances[0] + variances[1];
  const freedom = total ** 2 / variances.reduce((s, v, i) => s + v ** 2 / (groups[i].blocks - 1), 0);
  return tTail(Math.abs(groups[0].share - groups[1].share) / Math.sqrt(total), freedom);
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
      found.push({ layer: l, head, by: a.load[l][head] - b.load[l][head], p: pValue(l, head, a, b) });
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

  let found = new Map(), widest = 0.1, forget = [], seen = false;
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
    const [one, other] = [a, b].map(({ seen }) => Math.max(...seen.map((of) => (of ? of[1] : 0))));
    const counted = `${one} and ${other} ${D.observations}`;
    byId("verdict").textContent = !top ? "No layer saw both." :
      (tested ? `${sure.length} of ${tested} heads differ significantly (${counted}). `
        : `No test: there are ${counted}, and it takes ${D.least} of each to tell a difference from chance. `) +
      `The largest difference: head ${top.head} of ${layerName(top.layer)}, used by ${percent(a.load[top.layer][top.head])} ` +
      `of the first and ${percent(b.load[top.layer][top.head])} of the second.`;
    paint();
    if (seen) drawSides(a, b);
  }
  function drawSides(...parts) {
    forget.forEach((end) => end());
    const sides = byId("sides");
    sides.replaceChildren();
    forget = parts.filter((part) => part.sequences.length).flatMap((part) => {
      const pictured = D.axes[part.sequences[0][0]].kind === "image";
      const side = sides.appendChild(make("div", { className: pictured ? "pictures" : "" }));
      return part.sequences.map(([axis, number]) => {
        const sequence = D.axes[axis].sequences[number];
        return pictured ? drawPicture(side, sequence.picture) : drawText(side, axis, sequence);
      });
    });
  }
  // Texts beside each other take as long to draw as all of them above, and the page shall open at once.
  new IntersectionObserver(([section], observer) => {
    if (!section.isIntersecting) return;
    observer.disconnect();
    seen = true;
    update();
  }).observe(byId("compare"));
  first.addEventListener("change", update);
  second.addEventListener("change", update);
  update();
}
