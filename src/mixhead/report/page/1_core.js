// The data, what is chosen, and colours. Text from the data reaches the page through textContent alone.
const D = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const root = document.documentElement;

function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in element && !name.startsWith("aria")) element[name] = value;
    else element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

function vector(tag, attributes = {}, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
for (const axis of D.axes) {
  axis.bits = bytes(axis.bits);
  axis.gates = axis.gates && bytes(axis.gates);
}

// What is chosen. Every view that depends on it registers a function, which `choose` calls with what changed.
const state = { layer: D.start, head: null, time: 0, token: null };
const views = [];
function choose(change) {
  if ("layer" in change) change.layer = Math.max(0, Math.min(D.layers.length - 1, change.layer));
  const heads = D.layers[change.layer ?? state.layer].heads;
  if ((change.head ?? state.head) >= heads) change.head = null;
  Object.assign(state, change);
  for (const view of views) view(change);
}

const axisOf = (layer) => D.axes[D.layers[layer].axis];

function uses(axis, token, column) {
  return (axis.bits[token * axis.stride + (column >> 3)] >> (7 - (column & 7))) & 1;
}

function headsOf(layer, token) {
  const { at, heads } = D.layers[layer], axis = axisOf(layer), used = [];
  for (let head = 0; head < heads; head++) if (uses(axis, token, at + head)) used.push(head);
  return used;
}

/* The weight of a head for a token, 0 to 1 within its call; 1 where heads are only switched. */
function weight(layer, token, head) {
  const axis = axisOf(layer);
  return axis.gates ? axis.gates[token * axis.width + D.layers[layer].at + head] / 255 : 1;
}

// Okabe and Ito's colours, told apart by readers with any colour vision; more heads take steps of viridis instead. The
// strip under a token and the number of a head say the same without colour.
const FEW = ["#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#b8a800", "#7f6fc9"];
const MANY = ["#440154", "#46327e", "#365c8d", "#277f8e", "#1fa187", "#4ac16d", "#a0da39", "#fde725"];
function headColour(layer, head) {
  const { heads, shared } = D.layers[layer];
  const competing = [...Array(heads).keys()].filter((h) => !shared.includes(h));
  const place = competing.indexOf(head);
  if (place < 0) return "transparent";
  return competing.length <= FEW.length + 1 ? FEW[place] ?? "#777777" : mix(MANY, place / Math.max(competing.length - 1, 1));
}

/* The used head that the fewest tokens use: what tells this token from others. Shared heads tell nothing. */
function telling(layer, token) {
  const { load, shared } = D.layers[layer];
  let best = null;
  for (const head of headsOf(layer, token))
    if (!shared.includes(head) && load[head] < 0.999 && (best === null || load[head] < load[best])) best = head;
  return best;
}

const parse = (hex) => [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));
function mix(stops, share) {
  const at = Math.max(0, Math.min(1, share)) * (stops.length - 1), i = Math.min(Math.floor(at), stops.length - 2);
  const [a, b] = [parse(stops[i]), parse(stops[i + 1])];
  return "#" + a.map((v, k) => Math.round(v + (b[k] - v) * (at - i)).toString(16).padStart(2, "0")).join("");
}
function inkOn(hex) {
  const [r, g, b] = parse(hex).map((v) => (v / 255 <= 0.03928 ? v / 255 / 12.92 : ((v / 255 + 0.055) / 1.055) ** 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b > 0.179 ? "#000000" : "#ffffff";
}
const ramp = (...names) => names.map((name) => getComputedStyle(root).getPropertyValue(`--${name}`).trim());

const percent = (share) => `${(100 * share).toFixed(share > 0 && share < 0.1 ? 1 : 0)}%`;
const layerName = (layer) => `layer ${D.layers[layer].short}`;
const listing = (heads) => (heads.length ? heads.join(", ") : "none");
