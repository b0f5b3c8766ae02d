// Pixels into canvases. A canvas has the pixels of its images and no more; style.css enlarges it, with sharp edges.

import { facts } from "./facts.js";

const [height, width, channels = 1] = facts.shape;
const colour = channels === 3;
// Channels that are not red, green and blue are shown as grey images side by side.
export const tile = { width: colour ? width : width * channels, height };

/** Gives a canvas room for so many images in a row. */
export function fit(canvas, count = 1) {
  canvas.width = tile.width * count;
  canvas.height = tile.height;
}

/** Draws an image, pixels in [0, 1], at a place in the row of a canvas. */
export function paint(canvas, pixels, place = 0) {
  const image = new ImageData(tile.width, tile.height);
  for (let y = 0; y < height; y++) {
    for (let x = 0; x < width; x++) {
      const from = (y * width + x) * channels;
      for (let channel = 0; channel < channels; channel++) {
        const value = 255 * pixels[from + channel];
        const to = 4 * (y * tile.width + x + (colour ? 0 : channel * width));
        if (colour) image.data[to + channel] = value;
        else image.data.fill(value, to, to + 3);
        image.data[to + 3] = 255;
      }
    }
  }
  canvas.getContext("2d").putImageData(image, place * tile.width, 0);
}

/** The means of the pixels. */
export function sigmoid(logits) {
  return logits.map((logit) => 1 / (1 + Math.exp(-logit)));
}
