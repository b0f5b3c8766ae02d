"""Images per second of the importance-weighted estimate of log p(x): ours, and the same estimator in PyTorch."""

import math
import statistics

from benchmarks.report import NOT_MEASURED, Check, Report, at_least
from benchmarks.turns import Measured, Runner, Setting, take_turns

SAMPLES = 1000
# Images times samples that are computed at once, the same on both sides.
BATCH = 4096
CONTENDERS = {
    "vae_jax.importance_log_px": "benchmarks.evaluate:ours",
    "PyTorch, no gradients": "benchmarks.evaluate:torch",
}


def run(quick: bool, gpu: bool) -> Report:
    """Times both estimators on the first test images, with the same parameters."""
    del gpu
    setting = Setting(images=10 if quick else 50)
    measured = take_turns(CONTENDERS, setting, rounds=3 if quick else 5)
    ours, torch = measured
    return Report(
        "evaluate",
        f"log p(x) of {setting.images} test images, with {SAMPLES:,} samples each, {BATCH:,} at once. Both sides have"
        " the same fresh parameters and run in turn; the table shows medians. Only the noise of the estimates differs.",
        setting._asdict() | {"samples": SAMPLES, "batch": BATCH},
        {"Throughput": [_row(estimator, setting) for estimator in measured]},
        [
            at_least("PyTorch's estimator takes at least as long as ours", torch.median, ours.median, 1),
            _same_estimate(ours, torch),
        ],
    )


def _row(estimator: Measured, setting: Setting) -> dict:
    if estimator.median is None:
        return {"estimator": estimator.name, "note": estimator.failure}
    return {
        "estimator": estimator.name,
        "median s": estimator.median,
        "images/s": setting.images / estimator.median,
        "samples/s": setting.images * SAMPLES / estimator.median,
        "log p(x), nats per image": statistics.fmean(estimator.returned),
        "runs s": [round(seconds, 4) for seconds in estimator.seconds],
    }


def _same_estimate(ours: Measured, torch: Measured) -> Check:
    claim = "the two estimates differ by less than 0.1 nats per image"
    if not ours.returned or not torch.returned:
        return Check(claim, NOT_MEASURED, None)
    difference = abs(statistics.fmean(ours.returned) - statistics.fmean(torch.returned))
    return Check(claim, f"{difference:.3g} nats", difference < 0.1)


def ours(setting: Setting) -> Runner:
    """Our estimator."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from vae_jax import TrainConfig, create_state, importance_log_px, load, to_pixels

    state = create_state(TrainConfig())
    images = to_pixels(jnp.asarray(load().test_images[: setting.images].reshape(-1, 784)))
    number = 0

    def run() -> float:
        nonlocal number
        number += 1
        estimates = importance_log_px(
            state.model, state.params, images, jnp.arange(len(images)), jax.random.key(number), SAMPLES, BATCH
        )
        return float(np.asarray(estimates, np.float64).mean())

    return Runner(run)


def torch(setting: Setting) -> Runner:
    """log 1/K sum_k p(x|z_k) p(z_k) / q(z_k|x), z_k ~ q(z|x), as a PyTorch user would write it.

    References:
      Burda et al., Importance Weighted Autoencoders, equation 8. https://arxiv.org/abs/1509.00519
    """
    import jax
    import torch
    import torch.nn.functional as F
    from torch import Tensor

    from torch_ref import convert
    from torch_ref.model import VAE
    from vae_jax import TrainConfig, create_state, load

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = VAE().to(device)
    model.load_state_dict(convert.to_state_dict(jax.device_get(create_state(TrainConfig()).params)))
    images = torch.from_numpy(load().test_images[: setting.images].reshape(-1, 784)).to(device).float() / 255

    def log_weights(batch: Tensor, samples: int) -> Tensor:
        mu, logvar = model.encoder(batch)
        eps = torch.randn(samples, *mu.shape, device=device)  # [samples, batch, latent]
        z = model.reparameterize(mu, logvar, eps)
        logits = model.decoder.logits(z)  # [samples, batch, pixels]
        bce = F.binary_cross_entropy_with_logits(logits, batch.expand_as(logits), reduction="none").sum(-1)
        # The last term is log p(z) - log q(z|x); the constants of the two normal densities cancel.
        return -bce - 0.5 * (z**2 - eps**2 - logvar).sum(-1)

    @torch.no_grad()
    def run() -> float:
        total = 0.0
        for batch in images.split(max(1, BATCH // SAMPLES)):
            total += torch.logsumexp(log_weights(batch, SAMPLES), dim=0).sum().item()
        return total / len(images) - math.log(SAMPLES)

    return Runner(run)
