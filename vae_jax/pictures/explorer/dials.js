// A dial for each latent dimension, and over it a strip: what the picture would be at each of its values.

import { facts, model } from "./facts.js";
import { order } from "./map.js";
import { fit, paint, sigmoid } from "./paint.js";
import { moveTo, onChange, place, requestFrame, whenIdle } from "./place.js";

const TILES = 9;
const RANGE = 4; // standard deviations of the prior; a strip has a tile for each whole number and is as wide
// A dimension that the model does not use: its posterior is the prior's, or the same for all images.
const DEAD_KLD = 0.01;
const DEAD_VARIANCE = 0.01;
const dials = [];
let next = 0; // the strip that is looked at next

export function startDials() {
  const dead = document.getElementById("dead");
  const isDead = (dimension) => facts.kld[dimension] < DEAD_KLD || facts.variance[dimension] < DEAD_VARIANCE;
  for (const dimension of order) {
    const list = document.getElementById(isDead(dimension) ? "dead-dials" : "live-dials");
    list.append(dial(dimension));
  }
  const count = order.filter(isDead).length;
  dead.hidden = !count;
  dead.querySelector("summary").textContent = `${count} of ${model.latent} dimensions that the model does not use`;
  dead.addEventListener("toggle", requestFrame);
  // Strips come into view.
  for (const event of ["scroll", "resize"]) addEventListener(event, requestFrame, { passive: true });
  onChange(show);
  whenIdle(drawStrip);
}

function dial(dimension) {
  const item = document.getElementById("dial").content.firstElementChild.cloneNode(true);
  const [slider, strip, value] = ["input", "canvas", "output"].map((name) => item.querySelector(name));
  slider.id = `z${dimension}`;
  slider.min = -RANGE;
  slider.max = RANGE;
  item.querySelector("label").htmlFor = slider.id;
  item.querySelector("label").textContent = `z${dimension}`;
  item.querySelector(".kld").textContent = `${facts.kld[dimension].toFixed(2)} nats`;
  fit(strip, TILES);
  const turn = (to) => moveTo(place.z.with(dimension, to));
  slider.addEventListener("input", () => turn(Number(slider.value)));
  strip.addEventListener("click", (event) => {
    turn(Math.floor((event.offsetX / strip.clientWidth) * TILES) - RANGE);
  });
  dials.push({ dimension, item, slider, strip, value, drawn: -1 });
  return item;
}

function show() {
  for (const { dimension, slider, value } of dials) {
    const here = place.z[dimension];
    if (Number(slider.value) !== here) slider.value = here;
    value.textContent = here.toFixed(2).replace("-", "\u2212");
    slider.setAttribute("aria-valuetext", here.toFixed(2));
  }
}

/** Draws one strip that is stale and can be seen, if there is one: each in its turn, so that all follow a drag. */
function drawStrip() {
  for (let tried = 0; tried < dials.length; tried++) {
    const dial = dials[next];
    next = (next + 1) % dials.length;
    if (dial.drawn === place.moves || !isSeen(dial.item)) continue;
    dial.drawn = place.moves;
    for (let i = 0; i < TILES; i++) {
      const z = place.z.with(dial.dimension, i - RANGE);
      paint(dial.strip, sigmoid(model.decode(z)), i);
    }
    return true;
  }
  return false;
}

function isSeen(item) {
  const { top, bottom, height } = item.getBoundingClientRect();
  return height > 0 && bottom > 0 && top < innerHeight;
}
