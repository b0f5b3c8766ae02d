// What Python has put into the page: facts as JSON, and weights, posteriors and images as base64.

import { Model } from "./model.js";

export const facts = JSON.parse(text("facts"));
export const model = new Model(facts.layers, floats(bytes("weights"), facts.half));
export const images = await readImages();

function text(id) {
  return document.getElementById(id).textContent;
}

function bytes(id) {
  return Uint8Array.from(atob(text(id)), (char) => char.charCodeAt(0));
}

/** Little-endian float32 or float16 as float32. */
function floats(content, half) {
  const view = new DataView(content.buffer);
  if (!half) return Float32Array.from({ length: content.length / 4 }, (_, i) => view.getFloat32(4 * i, true));
  return Float32Array.from({ length: content.length / 2 }, (_, i) => {
    const bits = view.getUint16(2 * i, true);
    const exponent = (bits >> 10) & 31;
    const fraction = bits & 1023;
    // Python lets no infinite number pass, so that the exponent is never 31.
    const size = exponent ? 2 ** (exponent - 25) * (1024 + fraction) : 2 ** -24 * fraction;
    return bits >> 15 ? -size : size;
  });
}

/**
 * The test images: each its pixels in [0, 1], the mu and logvar of its posterior, its number in its set, its label (null
 * where the set has none) and a name for people.
 */
async function readImages() {
  const stream = new Blob([bytes("images")]).stream().pipeThrough(new DecompressionStream("deflate"));
  const pixels = new Uint8Array(await new Response(stream).arrayBuffer());
  const posteriors = floats(bytes("posteriors"), false);
  const count = facts.numbers.length;
  return facts.numbers.map((number, i) => ({
    number,
    pixels: Float32Array.from(pixels.subarray(i * model.pixels, (i + 1) * model.pixels), (byte) => byte / 255),
    mu: posteriors.subarray(i * model.latent, (i + 1) * model.latent),
    logvar: posteriors.subarray((count + i) * model.latent, (count + i + 1) * model.latent),
    label: facts.labels ? facts.labels[i] : null,
    name: `test image ${number}` + (facts.labels ? `, label ${facts.labels[i]}` : ""),
  }));
}
