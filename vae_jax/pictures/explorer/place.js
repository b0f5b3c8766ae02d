// Where the reader is: a point z, and the image (of the test set, or drawn) whose posterior is shown. Everything that
// changes it ends in one decode a frame, however many events come in between; what takes longer waits for the frames.

import { model } from "./facts.js";

// Milliseconds of each frame for work that may wait. 60 frames a second leave 16.7.
const SLICE = 7;

/** Read it freely; change it by `moveTo` and `choose`. */
export const place = {
  z: new Float32Array(model.latent),
  image: null, // { pixels, mu, logvar, name, ... }
  logits: new Float32Array(model.pixels), // of z, as of the last frame
  moves: 0, // how often z has changed: work that is done for an older one is stale
};
const views = [];
const tasks = [];
let requested = false;
let moved = true;

/** Has `view` called after each change, once a frame. */
export function onChange(view) {
  views.push(view);
}

/** Adds work that may wait: `task` does a few milliseconds of it, and returns whether more is left. */
export function whenIdle(task) {
  tasks.push(task);
}

/** Goes to a point, and keeps the image. */
export function moveTo(z) {
  place.z = Float32Array.from(z);
  place.moves++;
  moved = true;
  requestFrame();
}

/** Goes to the posterior mean of an image; without one, the image that was chosen is chosen no longer. */
export function choose(image, z = image.mu) {
  place.image = image;
  moveTo(z);
}

/** Has the tasks looked at again. */
export function requestFrame() {
  if (requested) return;
  requested = true;
  requestAnimationFrame(onFrame);
}

function onFrame() {
  requested = false;
  if (moved) {
    moved = false;
    place.logits = model.decode(place.z);
    for (const view of views) view();
  }
  const end = performance.now() + SLICE;
  for (const task of tasks) {
    let left = task();
    while (left && performance.now() < end) left = task();
    if (left) requestFrame();
  }
}
