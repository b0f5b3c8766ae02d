// The pad: ink becomes an image as the makers of MNIST did it, and the model encodes it while the pen moves.

import { facts, model } from "./facts.js";
import { onClick } from "./now.js";
import { choose } from "./place.js";

const SIDE = 280; // of the pad, in its own pixels
const KEY_STEP = 8;
const [height, width, channels = 1] = facts.shape;
const pad = document.getElementById("pad");
const pen = pad.getContext("2d");
const paper = document.createElement("canvas"); // the ink alone, without the keyboard's cursor
const ink = paper.getContext("2d", { willReadFrequently: true });
const thickness = document.getElementById("thickness");
let strokes = []; // each { width, points }
let cursor = null; // of the keyboard: { x, y, down }
let due = false; // whether the ink will be read with the next frame

export function startDraw() {
  if (channels !== 1) {
    document.getElementById("pad-tools").hidden = true;
    document.getElementById("no-pad").hidden = false;
    return;
  }
  pad.width = pad.height = paper.width = paper.height = SIDE;
  onClick("undo", () => change(() => strokes.pop()));
  onClick("clear", () => change(() => (strokes = [])));
  listenToPointers();
  listenToKeys();
  draw();
}

/**
 * Ink as an image of the model's size, in the way of MNIST: cut to its bounding box, fitted with area averages into
 * 20 x 20 of 28 x 28 (or as large a part of another size), and its centre of mass put into the middle.
 *
 * @param {Float32Array} ink from 0 to 1, side x side
 */
export function normalise(ink, side) {
  const image = new Float32Array(height * width);
  const inked = [...ink.keys()].filter((i) => ink[i] > 0);
  if (!inked.length) return image;
  const bounds = (coordinates) => [coordinates.reduce((a, b) => Math.min(a, b)), coordinates.reduce((a, b) => Math.max(a, b)) + 1];
  const [left, right] = bounds(inked.map((i) => i % side));
  const [top, bottom] = bounds(inked.map((i) => Math.floor(i / side)));
  const scale = ((20 / 28) * Math.min(height, width)) / Math.max(right - left, bottom - top);
  const columns = Math.max(1, Math.round((right - left) * scale));
  const rows = Math.max(1, Math.round((bottom - top) * scale));
  const across = shares(left, right, columns);
  const down = shares(top, bottom, rows);
  const small = Array.from({ length: rows * columns }, (_, i) => {
    let sum = 0;
    for (const [y, part] of down[Math.floor(i / columns)]) {
      for (const [x, share] of across[i % columns]) sum += part * share * ink[y * side + x];
    }
    return sum;
  });
  const mass = small.reduce((a, b) => a + b);
  const centre = (coordinate) => small.reduce((sum, value, i) => sum + value * coordinate(i), 0) / mass;
  // MNIST's centres of mass lie at pixel 14, not between the pixels 13 and 14.
  const shift = (length, part, coordinate) => clamp(Math.round(length / 2 - centre(coordinate)), 0, length - part);
  const x = shift(width, columns, (i) => i % columns);
  const y = shift(height, rows, (i) => Math.floor(i / columns));
  for (const [i, value] of small.entries()) image[(y + Math.floor(i / columns)) * width + x + (i % columns)] = value;
  // A model of black and white images has never seen grey.
  return facts.binarize === "none" ? image : image.map((value) => Number(value > 0.5));
}

/** For each of `count` equal parts of a range, the whole numbers that it covers, and their shares of it. */
function shares(from, to, count) {
  const length = (to - from) / count;
  return Array.from({ length: count }, (_, i) => {
    const [start, end] = [from + i * length, from + (i + 1) * length];
    const covered = [];
    for (let at = Math.floor(start); at < end - 1e-9; at++) {
      covered.push([at, (Math.min(at + 1, end) - Math.max(at, start)) / length]);
    }
    return covered;
  });
}

function clamp(value, least, most) {
  return Math.max(least, Math.min(most, value));
}

function change(edit) {
  edit();
  draw();
  if (due) return;
  due = true;
  requestAnimationFrame(read);
}

/** Encodes what is drawn, once a frame at most. */
function read() {
  due = false;
  const { data } = ink.getImageData(0, 0, SIDE, SIDE);
  const amounts = Float32Array.from({ length: SIDE * SIDE }, (_, i) => data[4 * i + 3] / 255);
  const pixels = normalise(amounts, SIDE);
  choose({ pixels, ...model.encode(pixels), label: null, name: "your drawing" });
}

function draw() {
  ink.clearRect(0, 0, SIDE, SIDE);
  ink.lineCap = ink.lineJoin = "round";
  ink.strokeStyle = "white";
  for (const { width, points } of strokes) {
    ink.lineWidth = width;
    ink.beginPath();
    for (const [x, y] of points) ink.lineTo(x, y);
    ink.lineTo(...points[0].map((value, i) => (points.length > 1 ? points.at(-1)[i] : value))); // a dot is a line too
    ink.stroke();
  }
  pen.fillStyle = "black";
  pen.fillRect(0, 0, SIDE, SIDE);
  pen.drawImage(paper, 0, 0);
  if (!cursor) return;
  pen.strokeStyle = cursor.down ? "orange" : "silver";
  pen.lineWidth = 3;
  pen.beginPath();
  pen.arc(cursor.x, cursor.y, thickness.value / 2 + 2, 0, 2 * Math.PI);
  pen.stroke();
}

function begin(x, y) {
  strokes.push({ width: Number(thickness.value), points: [[x, y]] });
}

function listenToPointers() {
  let drawing = null; // the number of the pointer
  const at = (event) => {
    const box = pad.getBoundingClientRect();
    return [((event.clientX - box.left) / box.width) * SIDE, ((event.clientY - box.top) / box.height) * SIDE];
  };
  pad.addEventListener("pointerdown", (event) => {
    if (event.button || drawing !== null) return;
    pad.setPointerCapture(event.pointerId);
    drawing = event.pointerId;
    cursor = null;
    change(() => begin(...at(event)));
  });
  pad.addEventListener("pointermove", (event) => {
    if (event.pointerId !== drawing) return;
    // A browser bundles the moves of a frame.
    const moves = event.getCoalescedEvents?.() ?? [];
    change(() => strokes.at(-1)?.points.push(...(moves.length ? moves : [event]).map(at)));
  });
  for (const end of ["pointerup", "pointercancel"]) pad.addEventListener(end, () => (drawing = null));
}

function listenToKeys() {
  pad.addEventListener("keydown", (event) => {
    const ways = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    cursor ??= { x: SIDE / 2, y: SIDE / 4, down: false };
    if (ways[event.key]) {
      const [across, down] = ways[event.key];
      cursor.x = clamp(cursor.x + KEY_STEP * across, 0, SIDE);
      cursor.y = clamp(cursor.y + KEY_STEP * down, 0, SIDE);
      if (cursor.down) change(() => strokes.at(-1)?.points.push([cursor.x, cursor.y]));
    } else if (event.key === " ") {
      cursor.down = !cursor.down;
      if (cursor.down) change(() => begin(cursor.x, cursor.y));
    } else if (event.key === "Backspace") {
      cursor.down = false;
      change(() => strokes.pop());
    } else return;
    event.preventDefault();
    draw();
  });
  pad.addEventListener("blur", () => {
    cursor = null;
    draw();
  });
}
