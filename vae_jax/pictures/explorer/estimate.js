// BCE, KLD, loss and log p(x) of the image that is chosen: a little in every frame, until all draws are made.

import { model } from "./facts.js";
import { average, kld, logMeanExp, normal } from "./model.js";
import { onChange, place, requestFrame, whenIdle } from "./place.js";

const draws = document.getElementById("draws");
let image = null; // that the draws below belong to
let logWeights = [];
let crossEntropies = [];

export function startEstimate() {
  draws.addEventListener("change", restart);
  onChange(() => {
    if (place.image !== image) restart();
  });
  whenIdle(() => {
    const wanted = image ? Math.max(2, Math.round(Number(draws.value)) || 0) : 0;
    if (logWeights.length >= wanted) return false;
    const { logWeight, bce } = model.logWeight(image.pixels, image, normal(model.latent));
    logWeights.push(logWeight);
    crossEntropies.push(bce);
    const done = logWeights.length;
    if (done === wanted || (done >= 10 && done % 10 === 0)) show();
    return done < wanted;
  });
}

function restart() {
  image = place.image;
  logWeights = [];
  crossEntropies = [];
  document.getElementById("figures").classList.toggle("empty", !image);
  // With an image the former figures stay until there are new ones, a frame or two later.
  if (image) set("kld", kld(image).toFixed(2));
  else for (const name of ["bce", "kld", "loss", "log-px"]) set(name, "\u2013");
  if (!image) set("draws-note", "of no image: choose one, or draw one");
  requestFrame();
}

function show() {
  const cross = average(crossEntropies);
  const divergence = kld(image);
  const logPx = logMeanExp(logWeights);
  set("bce", withError(cross.value, cross.error));
  set("loss", withError(cross.value + divergence, cross.error));
  set("log-px", withError(logPx.value, logPx.error));
  const few = logPx.effective < 10 ? ": too few to trust the error bar, take more" : "";
  set("draws-note", `${Math.round(logPx.effective)} of ${logWeights.length} draws carry the estimate${few}`);
}

function withError(value, error) {
  return `${value.toFixed(2)} \u00b1 ${error.toFixed(2)}`.replace("-", "\u2212");
}

function set(id, content) {
  document.getElementById(id).textContent = content;
}
