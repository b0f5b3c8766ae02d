// The model, and what it says about an image: the same equations as in vae_jax/core, one function each. The sums are
// taken in double precision; weights, pixels and results are float32. All logarithms are natural: the unit is the nat.

const ACTIVATIONS = {
  none: (value) => value,
  relu: (value) => Math.max(value, 0),
  tanh: Math.tanh,
  elu: (value) => (value > 0 ? value : Math.expm1(value)),
  silu: (value) => value / (1 + Math.exp(-value)),
};

export class Model {
  /**
   * @param {Object} shapes for each part (body, mu, logvar, decoder) its layers as [inputs, outputs, activation]
   * @param {Float32Array} weights of all layers in this order: the kernel, [inputs, outputs] row by row, and the bias
   */
  constructor(shapes, weights) {
    let start = 0;
    const take = (length) => weights.subarray(start, (start += length));
    const layer = ([inputs, outputs, activation]) => ({
      kernel: take(inputs * outputs),
      bias: take(outputs),
      activation: ACTIVATIONS[activation],
      outputs: new Float64Array(outputs), // overwritten by each use: nothing is allocated while the reader drags
    });
    this.parts = {};
    for (const name of ["body", "mu", "logvar", "decoder"]) this.parts[name] = shapes[name].map(layer);
    this.latent = shapes.mu.at(-1)[1];
    this.pixels = shapes.decoder.at(-1)[1];
  }

  /** mu and logvar of the posterior of an image; pixels in [0, 1], channels last. */
  encode(pixels) {
    const hidden = chain(this.parts.body, pixels);
    return {
      mu: Float32Array.from(chain(this.parts.mu, hidden)),
      logvar: Float32Array.from(chain(this.parts.logvar, hidden)),
    };
  }

  /** Logits of the pixels at a latent point. */
  decode(z) {
    return Float32Array.from(chain(this.parts.decoder, z));
  }

  /** log of the importance weight of a draw, p(x | z) p(z) / q(z | x) with z = mu + exp(logvar / 2) * eps, and its bce. */
  logWeight(pixels, { mu, logvar }, eps) {
    const z = mu.map((mean, i) => mean + Math.exp(logvar[i] / 2) * eps[i]);
    const cross = bce(chain(this.parts.decoder, z), pixels);
    // The constants of the two Gaussians cancel.
    let logWeight = -cross;
    for (let i = 0; i < z.length; i++) logWeight += (eps[i] ** 2 + logvar[i] - z[i] ** 2) / 2;
    return { logWeight, bce: cross };
  }
}

function chain(layers, x) {
  for (const { kernel, bias, activation, outputs } of layers) {
    outputs.set(bias);
    for (let i = 0, row = 0; i < x.length; i++, row += outputs.length) {
      const value = x[i];
      if (value === 0) continue; // most pixels, and about half of the hidden units
      for (let j = 0; j < outputs.length; j++) outputs[j] += value * kernel[row + j];
    }
    if (activation !== ACTIVATIONS.none) for (let j = 0; j < outputs.length; j++) outputs[j] = activation(outputs[j]);
    x = outputs;
  }
  return x;
}

/** Binary cross entropy of pixels in [0, 1], summed over the pixels. */
export function bce(logits, pixels) {
  let sum = 0;
  for (let i = 0; i < logits.length; i++) {
    const logit = logits[i];
    // log(1 + exp(l)) as max(l, 0) + log1p(exp(-|l|)): never infinite
    sum += Math.max(logit, 0) + Math.log1p(Math.exp(-Math.abs(logit))) - logit * pixels[i];
  }
  return sum;
}

/** KL divergence from N(mu, exp(logvar)) to N(0, I). */
export function kld({ mu, logvar }) {
  let sum = 0;
  for (let i = 0; i < mu.length; i++) sum += 1 + logvar[i] - mu[i] ** 2 - Math.exp(logvar[i]);
  return -sum / 2;
}

/**
 * log of the mean of weights, from their logarithms: log p(x) by importance sampling (Burda et al. 2015, equation 8).
 *
 * `error` is its standard error by the delta method, sd(w) / (sqrt(K) mean(w)). `effective` is how many draws carry the
 * mean: where they are few, the error is itself too small.
 */
export function logMeanExp(logWeights) {
  const count = logWeights.length;
  const top = logWeights.reduce((a, b) => Math.max(a, b), -Infinity);
  let sum = 0;
  let squares = 0;
  for (const logWeight of logWeights) {
    const weight = Math.exp(logWeight - top);
    sum += weight;
    squares += weight ** 2;
  }
  const mean = sum / count;
  const variance = Math.max(0, squares / count - mean ** 2) * (count / (count - 1));
  return {
    value: top + Math.log(mean),
    error: Math.sqrt(variance / count) / mean,
    effective: sum ** 2 / squares,
  };
}

/** The mean of numbers, and its standard error. */
export function average(numbers) {
  const count = numbers.length;
  const mean = numbers.reduce((a, b) => a + b, 0) / count;
  const squares = numbers.reduce((sum, number) => sum + (number - mean) ** 2, 0);
  return { value: mean, error: Math.sqrt(squares / (count - 1) / count) };
}

/** A draw from N(0, I), by the method of Box and Muller. */
export function normal(length) {
  return Float32Array.from({ length }, () => {
    const radius = Math.sqrt(-2 * Math.log(1 - Math.random()));
    return radius * Math.cos(2 * Math.PI * Math.random());
  });
}
