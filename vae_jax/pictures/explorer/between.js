// From one place to another: a filmstrip of the path, which the reader can walk or play.

import { images, model } from "./facts.js";
import { onClick } from "./now.js";
import { fit, paint, sigmoid } from "./paint.js";
import { choose, place } from "./place.js";

const FRAMES = 11;
const SECONDS = 4; // from end to end
const film = document.getElementById("film");
const slider = document.getElementById("way");
const kind = document.getElementById("path");
const play = document.getElementById("play");
const ends = [];
let playing = false;

export function startBetween() {
  const first = images[0];
  const second = images.find((image) => image.label !== first.label) ?? images.at(-1);
  for (const [i, image] of [first, second].entries()) {
    const end = "ab"[i];
    fit(document.getElementById(`end-${end}`));
    onClick(`set-${end}`, () => setEnd(i, place.z));
    ends[i] = image.mu;
  }
  fit(film, FRAMES);
  ends.forEach((z, i) => setEnd(i, z));
  kind.addEventListener("change", drawFilm);
  slider.addEventListener("input", walk);
  film.addEventListener("click", (event) => {
    const frame = Math.floor((event.offsetX / film.clientWidth) * FRAMES);
    slider.value = frame / (FRAMES - 1);
    walk();
  });
  play.addEventListener("click", () => (playing ? stopPlaying() : startPlaying()));
}

/** The point at t, from 0 to 1, on the straight line from a to b, or on the great circle in equal angles. */
export function between(a, b, t, spherical) {
  const dot = (left, right) => left.reduce((sum, value, i) => sum + value * right[i], 0);
  const cosine = dot(a, b) / Math.max(Math.sqrt(dot(a, a) * dot(b, b)), Number.MIN_VALUE);
  const angle = Math.acos(Math.max(-1, Math.min(1, cosine)));
  // No single great circle joins parallel vectors: they get the straight line.
  const curved = spherical && Math.sin(angle) > 1e-3;
  const part = (share) => (curved ? Math.sin(share * angle) / Math.sin(angle) : share);
  return a.map((value, i) => part(1 - t) * value + part(t) * b[i]);
}

export function stopPlaying() {
  playing = false;
  play.textContent = "Play";
}

function setEnd(i, z) {
  ends[i] = Float32Array.from(z);
  paint(document.getElementById(`end-${"ab"[i]}`), sigmoid(model.decode(z)));
  drawFilm();
}

function at(t) {
  return between(...ends, t, kind.value === "spherical");
}

function drawFilm() {
  for (let i = 0; i < FRAMES; i++) paint(film, sigmoid(model.decode(at(i / (FRAMES - 1)))), i);
}

function walk() {
  choose(null, at(Number(slider.value)));
}

function startPlaying() {
  playing = true;
  play.textContent = "Stop";
  let way = slider.value < 1 ? 1 : -1;
  let before = null;
  let moves = place.moves;
  const step = (now) => {
    // Whoever goes elsewhere meanwhile is left there.
    if (place.moves !== moves) stopPlaying();
    if (!playing) return;
    const t = Number(slider.value) + (way * (now - (before ?? now))) / 1000 / SECONDS;
    before = now;
    if (t >= 1) way = -1;
    if (t <= 0) way = 1;
    slider.value = t;
    walk();
    moves = place.moves;
    requestAnimationFrame(step);
  };
  requestAnimationFrame(step);
}
