// The place where the reader is: the image that was chosen, what the model makes of the point, and ways to go elsewhere
// or to take it away.

import { facts, images, model } from "./facts.js";
import { normal } from "./model.js";
import { fit, paint, sigmoid, tile } from "./paint.js";
import { choose, moveTo, onChange, place } from "./place.js";

const input = document.getElementById("input");
const output = document.getElementById("output");
const number = document.getElementById("number");
let shown; // the image that `input` shows

export function startNow() {
  fit(input);
  fit(output);
  onChange(show);
  onClick("random", () => choose(images[Math.floor(Math.random() * images.length)]));
  onClick("prior", () => choose(null, normal(model.latent)));
  onClick("origin", () => choose(null, new Float32Array(model.latent)));
  onClick("back", () => moveTo(place.image.mu));
  number.max = images.length;
  document.getElementById("count").textContent = images.length;
  number.addEventListener("change", () => {
    const image = images[Math.round(Number(number.value)) - 1];
    if (image) choose(image);
  });
  onClick("save-png", savePng);
  onClick("save-json", () => {
    const { name, number = null, label = null } = place.image ?? {};
    const latents = { model: facts.name, image: place.image && { name, number, label }, z: [...place.z] };
    save(new Blob([JSON.stringify(latents, null, 2) + "\n"], { type: "application/json" }), "latent.json");
  });
}

export function onClick(id, action) {
  document.getElementById(id).addEventListener("click", action);
}

function show() {
  paint(output, sigmoid(place.logits));
  const { image } = place;
  const moved = image && image.mu.some((value, i) => value !== place.z[i]);
  document.getElementById("output-name").textContent = moved ? "decoded, moved away" : image ? "reconstruction" : "decoded";
  document.getElementById("back").disabled = !moved;
  if (image === shown) return;
  shown = image;
  number.value = images.indexOf(image) + 1 || "";
  document.getElementById("input-name").textContent = image ? image.name : "no image";
  input.setAttribute("aria-label", image ? `The image: ${image.name}` : "No image is chosen");
  paint(input, image ? image.pixels : new Float32Array(model.pixels));
}

function savePng() {
  // Enlarged by a whole number, so that every pixel stays a square.
  const scale = Math.max(1, Math.floor(512 / Math.max(tile.width, tile.height)));
  const large = document.createElement("canvas");
  large.width = tile.width * scale;
  large.height = tile.height * scale;
  const pen = large.getContext("2d");
  pen.imageSmoothingEnabled = false;
  pen.drawImage(output, 0, 0, large.width, large.height);
  large.toBlob((blob) => save(blob, "decoded.png"));
}

function save(blob, name) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000); // the browser reads it after the click
}
