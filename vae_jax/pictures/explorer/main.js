// Starts everything: the heading, the tabs, the link that brings a place back, and what tests and consoles may call.

import { startBetween, stopPlaying } from "./between.js";
import { startDials } from "./dials.js";
import { startDraw } from "./draw.js";
import { startEstimate } from "./estimate.js";
import { facts, images, model } from "./facts.js";
import { axesName, showAxes, startMap } from "./map.js";
import { bce, kld, logMeanExp } from "./model.js";
import { onClick, startNow } from "./now.js";
import { choose, onChange, place } from "./place.js";

/**
 * The model, for tests and for the console of the browser. All arrays are flat; pixels are in [0, 1], channels last;
 * everything is in nats.
 *
 * images: the test images in the page, each { pixels, mu, logvar, number, label, name }
 * encode(pixels): { mu, logvar } of the posterior
 * decode(z): the logits of the pixels
 * losses(pixels, eps): { bce, kld, loss } at z = mu + exp(logvar / 2) * eps
 * logPx(pixels, draws): { value, error, effective } from an array of K draws of eps
 * place: where the page is, { z, image, logits }
 */
window.vae = {
  images,
  place,
  encode: (pixels) => model.encode(pixels),
  decode: (z) => model.decode(z),
  losses(pixels, eps) {
    const posterior = model.encode(pixels);
    const z = posterior.mu.map((mean, i) => mean + Math.exp(posterior.logvar[i] / 2) * eps[i]);
    const [cross, divergence] = [bce(model.decode(z), pixels), kld(posterior)];
    return { bce: cross, kld: divergence, loss: cross + divergence };
  },
  logPx(pixels, draws) {
    const posterior = model.encode(pixels);
    return logMeanExp(draws.map((eps) => model.logWeight(pixels, posterior, eps).logWeight));
  },
};

const tabs = [...document.querySelectorAll("[role=tab]")];

tellAbout();
startMap();
startNow();
startEstimate();
startDials();
startDraw();
startBetween();
startTabs();
startLinks();
announce();

function tellAbout() {
  const sizes = [...facts.layers.body, ...facts.layers.mu, ...facts.layers.decoder].map(([inputs]) => inputs);
  document.title = `The latent space of ${facts.name}`;
  document.querySelector("h1").textContent = document.title;
  const { training } = facts;
  const parts = [`${[...sizes, model.pixels].join("\u2013")}`, `${facts.data}, ${facts.shape.join(" \u00d7 ")}`];
  if (training) {
    const seconds = training.seconds < 10 ? training.seconds.toFixed(1) : Math.round(training.seconds);
    parts.push(`${training.epoch} epoch${training.epoch > 1 ? "s" : ""} in ${seconds} s on ${training.device ?? "an unnamed device"}`);
    parts.push(`training loss ${training.train_loss.toFixed(2)}, test loss ${training.test_loss.toFixed(2)} nats`);
  }
  if (facts.half) parts.push("weights in half precision");
  document.getElementById("training").textContent = parts.join(" \u00b7 ");
  const options = document.getElementById("options");
  options.hidden = !Object.keys(facts.options).length;
  for (const [name, value] of Object.entries(facts.options)) {
    const [term, description] = [document.createElement("dt"), document.createElement("dd")];
    [term.textContent, description.textContent] = [name.replaceAll("_", " "), value];
    options.querySelector("dl").append(term, description);
  }
}

function startTabs() {
  for (const [i, tab] of tabs.entries()) {
    tab.addEventListener("click", () => show(tab));
    tab.addEventListener("keydown", (event) => {
      const to = { ArrowRight: i + 1, ArrowLeft: i - 1, Home: 0, End: -1 }[event.key];
      if (to === undefined) return;
      const other = tabs.at(to % tabs.length);
      other.focus();
      show(other);
      event.preventDefault();
    });
  }
}

function show(chosen) {
  stopPlaying();
  for (const tab of tabs) {
    tab.setAttribute("aria-selected", String(tab === chosen));
    tab.tabIndex = tab === chosen ? 0 : -1;
    document.getElementById(tab.getAttribute("aria-controls")).hidden = tab !== chosen;
  }
  dispatchEvent(new Event("resize")); // strips may have come into view
}

function startLinks() {
  const field = document.getElementById("link");
  onClick("make-link", () => {
    const parts = [`axes=${axesName()}`, `tab=${tabs.find((tab) => tab.tabIndex === 0).id.slice(4)}`, `z=${packed(place.z)}`];
    if (place.image?.number !== undefined) parts.unshift(`image=${place.image.number}`);
    location.hash = parts.join("&");
    field.value = location.href;
    field.hidden = false;
    field.focus();
    field.select();
    navigator.clipboard?.writeText(location.href).catch(() => {}); // where that is not allowed, the field is selected
  });
  addEventListener("hashchange", follow);
  choose(images[0]);
  follow();
}

/** Goes where the hash of the address says; what it says wrongly is left out. */
function follow() {
  const wanted = new URLSearchParams(location.hash.slice(1));
  showAxes(wanted.get("axes"));
  const tab = tabs.find(({ id }) => id === `tab-${wanted.get("tab")}`);
  if (tab) show(tab);
  const image = images.find(({ number }) => String(number) === wanted.get("image")) ?? null;
  const z = unpacked(wanted.get("z") ?? "");
  if (z || image) choose(image, z ?? image.mu);
}

/** A latent point as text for an address: its float32 values, exactly, in base64 for addresses. */
function packed(z) {
  const content = new DataView(new ArrayBuffer(4 * z.length));
  z.forEach((value, i) => content.setFloat32(4 * i, value, true));
  const text = btoa(String.fromCharCode(...new Uint8Array(content.buffer)));
  return text.replaceAll("+", "-").replaceAll("/", "_").replaceAll("=", "");
}

/** The point of such a text, or null if it is none of this model. */
function unpacked(text) {
  try {
    const content = Uint8Array.from(atob(text.replaceAll("-", "+").replaceAll("_", "/")), (char) => char.charCodeAt(0));
    if (content.length !== 4 * model.latent) return null;
    const view = new DataView(content.buffer);
    const z = Float32Array.from({ length: model.latent }, (_, i) => view.getFloat32(4 * i, true));
    return z.every(Number.isFinite) ? z : null;
  } catch {
    return null; // not base64
  }
}

/** Tells a screen reader where the reader has come to, once nothing has moved for a moment. */
function announce() {
  let timer;
  onChange(() => {
    clearTimeout(timer);
    timer = setTimeout(() => {
      const what = place.image ? place.image.name : "no image";
      document.getElementById("status").textContent = `${what}; ${document.getElementById("output-name").textContent}`;
    }, 600);
  });
}
