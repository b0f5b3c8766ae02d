// The map: the test images at the means of their posteriors, on two axes of the latent space. It looks along all other
// axes, and walking on it leaves them as they are.

import { facts, images, model } from "./facts.js";
import { fit, paint } from "./paint.js";
import { choose, moveTo, onChange, place } from "./place.js";

const NEAR = 12; // CSS pixels within which a pointer means a point
const STEP = 0.1; // of an arrow key
const canvas = document.getElementById("map");
const context = canvas.getContext("2d");
const ground = document.createElement("canvas"); // all that stays the same while the reader walks
const tip = document.getElementById("map-tip");
const choice = document.getElementById("map-axes");
const pickers = [document.getElementById("map-across"), document.getElementById("map-up")];
// Dimensions of the largest KLD first; two alone stay in their order.
export const order = [...facts.kld.keys()].sort((a, b) => (model.latent === 2 ? a - b : facts.kld[b] - facts.kld[a]));

let axes; // two unit vectors that are orthogonal to each other
let points; // of the images, on these axes
let reach; // of the map, from its middle to its edge
let size; // of its sides, in CSS pixels
let lit = null; // the label that the legend singles out

export function startMap() {
  fillPickers();
  choice.addEventListener("change", setAxes);
  for (const [i, picker] of pickers.entries()) {
    picker.addEventListener("change", () => {
      // The two axes have to differ: the other one becomes what this one was.
      if (pickers[0].value === pickers[1].value) pickers[1 - i].value = picker.dataset.former;
      setAxes();
    });
  }
  fillLegend();
  listen();
  new ResizeObserver(drawGround).observe(canvas);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawGround);
  fit(tip.querySelector("canvas"));
  setAxes();
  onChange(draw);
}

/** The axes as a link has them: kld, pca, or two dimensions such as 3,7. */
export function axesName() {
  return choice.value === "any" ? pickers.map((picker) => picker.value).join() : choice.value;
}

/** Sets the axes from such a name; any other text changes nothing. */
export function showAxes(name) {
  const two = /^(\d+),(\d+)$/.exec(name);
  if (two && two[1] !== two[2] && Math.max(two[1], two[2]) < model.latent) {
    choice.value = "any";
    pickers[0].value = Number(two[1]);
    pickers[1].value = Number(two[2]);
  } else if (name === "kld" || name === "pca") choice.value = name;
  else return;
  setAxes();
}

function fillPickers() {
  for (const [i, picker] of pickers.entries()) {
    for (const dimension of order) picker.add(new Option(`z${dimension} (KLD ${facts.kld[dimension].toFixed(2)})`, dimension));
    picker.value = order[i];
  }
}

function fillLegend() {
  const legend = document.getElementById("map-legend");
  for (const label of [...new Set(facts.labels)].sort((a, b) => a - b)) {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = label;
    button.className = `label-${colourOf(label)}`;
    button.title = `Single out label ${label}`;
    button.setAttribute("aria-pressed", "false");
    button.addEventListener("click", () => {
      lit = lit === label ? null : label;
      for (const other of legend.children) other.setAttribute("aria-pressed", String(other === button && lit !== null));
      drawGround();
    });
    legend.append(button);
  }
}

function colourOf(label) {
  return ((label % 10) + 10) % 10;
}

function setAxes() {
  document.getElementById("map-picked").hidden = choice.value !== "any";
  const picked = choice.value === "any" ? pickers.map((picker) => Number(picker.value)) : order.slice(0, 2);
  for (const picker of pickers) picker.dataset.former = picker.value;
  const unit = (dimension) => Float64Array.from({ length: model.latent }, (_, i) => Number(i === dimension));
  axes = choice.value === "pca" ? facts.components : picked.map(unit);
  const percent = (share) => `${Math.round(100 * share)}%`;
  const names = choice.value === "pca"
    ? facts.shares.map((share, i) => `principal component ${i + 1}, ${percent(share)} of the variance of \u03bc`)
    : picked.map((dimension) => `z${dimension}, KLD ${facts.kld[dimension].toFixed(2)} nats`);
  document.getElementById("map-caption").textContent = `Across: ${names[0]}. Up: ${names[1]}.`;
  points = images.map((image) => project(image.mu));
  reach = points.reduce((most, point) => Math.max(most, Math.abs(point[0]), Math.abs(point[1])), 3.05) * 1.06;
  drawGround();
}

function project(z) {
  return axes.map((axis) => z.reduce((sum, value, i) => sum + value * axis[i], 0));
}

function toScreen([across, up]) {
  return [(across / reach + 1) * (size / 2), (1 - up / reach) * (size / 2)];
}

/** The point of the latent space under a place on the map, with all that the map does not show as it is. */
function under([x, y]) {
  const target = [((2 * x) / size - 1) * reach, (1 - (2 * y) / size) * reach];
  return walked(project(place.z).map((here, i) => target[i] - here));
}

function walked([across, up]) {
  return place.z.map((value, i) => value + across * axes[0][i] + up * axes[1][i]);
}

function nearest(screen, within) {
  let best = null;
  let distance = within;
  for (const [i, point] of points.entries()) {
    const [x, y] = toScreen(point);
    const far = Math.hypot(x - screen[0], y - screen[1]);
    if (far < distance) [best, distance] = [images[i], far];
  }
  return best;
}

function drawGround() {
  size = canvas.clientWidth;
  if (!size) return;
  for (const layer of [canvas, ground]) layer.width = layer.height = Math.round(size * devicePixelRatio);
  const style = getComputedStyle(canvas);
  const ink = (name) => style.getPropertyValue(name);
  const pen = ground.getContext("2d");
  pen.scale(devicePixelRatio, devicePixelRatio);
  pen.strokeStyle = pen.fillStyle = ink("--faint");
  pen.font = "12px system-ui, sans-serif";
  const [middle] = toScreen([0, 0]);
  for (const radius of [1, 2, 3]) {
    pen.beginPath();
    pen.arc(middle, middle, (radius / reach) * (size / 2), 0, 2 * Math.PI);
    pen.stroke();
  }
  pen.beginPath();
  pen.moveTo(0, middle);
  pen.lineTo(size, middle);
  pen.moveTo(middle, 0);
  pen.lineTo(middle, size);
  pen.stroke();
  pen.textAlign = "center";
  pen.textBaseline = "middle";
  // A label is written where its image lies: colour is never all that tells two labels apart.
  const short = facts.labels && facts.labels.every((label) => String(label).length < 4);
  pen.font = "600 12px system-ui, sans-serif";
  for (const [i, point] of points.entries()) {
    const { label } = images[i];
    pen.globalAlpha = lit === null || lit === label ? 1 : 0.15;
    pen.fillStyle = ink(label === null ? "--accent" : `--label-${colourOf(label)}`);
    const [x, y] = toScreen(point);
    if (short) pen.fillText(label, x, y);
    else pen.fillRect(x - 2, y - 2, 4, 4);
  }
  pen.globalAlpha = 1;
  pen.textAlign = "right";
  pen.font = "12px system-ui, sans-serif";
  pen.lineWidth = 4;
  pen.strokeStyle = ink("--sheet");
  pen.fillStyle = ink("--quiet");
  for (const radius of [1, 2, 3]) {
    const [x] = toScreen([radius, 0]);
    pen.strokeText(`${radius}\u03c3`, x - 4, middle - 9);
    pen.fillText(`${radius}\u03c3`, x - 4, middle - 9);
  }
  draw();
}

function draw() {
  if (!size) return;
  context.setTransform(1, 0, 0, 1, 0, 0);
  context.clearRect(0, 0, canvas.width, canvas.height);
  context.drawImage(ground, 0, 0);
  context.scale(devicePixelRatio, devicePixelRatio);
  const style = getComputedStyle(canvas);
  if (place.image) drawPosterior(place.image, style.getPropertyValue("--accent"));
  const [x, y] = toScreen(project(place.z));
  for (const [radius, width, name] of [[9, 5, "--sheet"], [9, 2.5, "--ink"]]) {
    context.lineWidth = width;
    context.strokeStyle = style.getPropertyValue(name);
    context.beginPath();
    context.arc(x, y, radius, 0, 2 * Math.PI);
    context.stroke();
  }
}

/** One and two standard deviations of the posterior, as the map sees them. */
function drawPosterior({ mu, logvar }, colour) {
  const covariance = (a, b) => logvar.reduce((sum, value, i) => sum + axes[a][i] * axes[b][i] * Math.exp(value), 0);
  // The factor of Cholesky: it turns a circle into the ellipse.
  const across = Math.sqrt(covariance(0, 0));
  const slant = covariance(0, 1) / across;
  const up = Math.sqrt(Math.max(0, covariance(1, 1) - slant ** 2));
  const middle = project(mu);
  context.strokeStyle = context.fillStyle = colour;
  context.lineWidth = 2;
  for (const deviations of [1, 2]) {
    context.beginPath();
    for (let angle = 0; angle < 2 * Math.PI; angle += 0.05) {
      const [cos, sin] = [deviations * Math.cos(angle), deviations * Math.sin(angle)];
      context.lineTo(...toScreen([middle[0] + across * cos, middle[1] + slant * cos + up * sin]));
    }
    context.closePath();
    context.globalAlpha = 0.14;
    context.fill();
    context.globalAlpha = 1;
    context.stroke();
  }
}

function listen() {
  const at = (event) => [event.offsetX, event.offsetY];
  let start = null; // where the pointer went down
  let dragging = false;
  canvas.addEventListener("pointerdown", (event) => {
    if (event.button) return;
    canvas.setPointerCapture(event.pointerId);
    start = at(event);
    dragging = false;
    tip.hidden = true;
  });
  canvas.addEventListener("pointermove", (event) => {
    if (!start) return showTip(event.pointerType === "mouse" ? nearest(at(event), NEAR) : null);
    dragging ||= Math.hypot(event.offsetX - start[0], event.offsetY - start[1]) > 4;
    if (dragging) moveTo(under(at(event)));
  });
  canvas.addEventListener("pointerup", (event) => {
    if (!start) return;
    const image = nearest(at(event), NEAR);
    if (!dragging && image) choose(image);
    else moveTo(under(at(event)));
    start = null;
  });
  canvas.addEventListener("pointercancel", () => (start = null));
  canvas.addEventListener("pointerleave", () => showTip(null));
  canvas.addEventListener("keydown", (event) => {
    const step = event.shiftKey ? 5 * STEP : STEP;
    const ways = { ArrowLeft: [-step, 0], ArrowRight: [step, 0], ArrowUp: [0, step], ArrowDown: [0, -step] };
    if (ways[event.key]) moveTo(walked(ways[event.key]));
    else if (event.key === "Enter" || event.key === " ") choose(nearest(toScreen(project(place.z)), Infinity));
    else if (event.key === "Home") moveTo(new Float32Array(model.latent));
    else return;
    event.preventDefault();
  });
}

function showTip(image) {
  tip.hidden = !image;
  if (!image) return;
  paint(tip.querySelector("canvas"), image.pixels);
  tip.querySelector("span").textContent = image.name;
  const [x, y] = toScreen(project(image.mu));
  tip.style.left = `${Math.min(x + 14, size - 120)}px`;
  tip.style.top = `${Math.max(0, y - 60)}px`;
}
