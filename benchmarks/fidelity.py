"""How far JAX and PyTorch drift apart: step by step from one start, and in the losses of 10 epochs from many seeds."""

import contextlib
import math
import statistics

from benchmarks.report import Check, Report
from benchmarks.turns import Setting, isolated, isolated_together

# Parameters are compared every so many steps; a divisor of the 469 steps of an epoch.
CHUNK = 7


def run(quick: bool, gpu: bool) -> Report:
    """Compares both sides on the GPU if there is one, else on the CPU."""
    del gpu
    setting = Setting(images=CHUNK * 2 * 128 if quick else 60000)
    divergence = {dtype: isolated("benchmarks.fidelity:divergence", setting, dtype) for dtype in ("float32", "float64")}
    setting = Setting(images=3200 if quick else 60000)
    seeds, epochs = (2, 1) if quick else (5, 10)
    # Both at the same time, a core each: nothing is timed, and two cores gain little on such small products.
    sides = {"vae_jax": "benchmarks.fidelity:train_ours", "PyTorch": "benchmarks.fidelity:train_torch"}
    losses = dict(zip(sides, isolated_together(list(sides.values()), setting, seeds, epochs), strict=True))
    return Report(
        "fidelity",
        "Divergence: both sides start from the same parameters and take the same batches and noise. The table shows the"
        f" largest absolute difference of any parameter after every {CHUNK} steps, and the largest relative difference"
        " of a loss in these steps."
        f" Seeds: each side has its own initialization, order and noise, and trains for {epochs} epochs from {seeds}"
        " seeds; losses in nats per image (with the cross entropy of grey pixels). To save time, PyTorch has its images"
        " in memory and a fused Adam here: the same arithmetic.",
        {"epochs": epochs, "seeds": seeds},
        {
            "Divergence": [
                {"steps": row["steps"]}
                | {
                    f"{dtype} {what}": divergence[dtype][number][what]
                    for dtype in divergence
                    for what in ("parameters", "loss")
                }
                for number, row in enumerate(divergence["float64"])
            ],
            "Final losses": [
                {"side": side, "seed": seed} | found for side, runs in losses.items() for seed, found in enumerate(runs)
            ],
            "Mean and deviation": [_spread(side, runs) for side, runs in losses.items()],
        },
        [_divergence_check(divergence["float64"])]
        + [_seeds_check(name, losses["vae_jax"], losses["PyTorch"]) for name in ("train loss", "test loss")],
    )


def _spread(side: str, runs: list[dict]) -> dict:
    row = {"side": side}
    for name in runs[0]:
        values = [found[name] for found in runs]
        row |= {f"{name} mean": statistics.fmean(values), f"{name} deviation": statistics.stdev(values)}
    return row


def _divergence_check(rows: list[dict]) -> Check:
    last = rows[-1]
    return Check(
        f"float64: after {last['steps']} steps, every parameter differs by less than 1e-8",
        f"{last['parameters']:.1e}",
        last["parameters"] < 1e-8,
    )


def _seeds_check(name: str, ours: list[dict], theirs: list[dict]) -> Check:
    a, b = ([found[name] for found in runs] for runs in (ours, theirs))
    error = math.sqrt(statistics.variance(a) / len(a) + statistics.variance(b) / len(b))
    difference = abs(statistics.fmean(a) - statistics.fmean(b))
    return Check(
        f"the means of the final {name} differ by less than 3 combined standard errors",
        f"{difference:.3g} nats; 3 standard errors are {3 * error:.3g}",
        difference < 3 * error,
    )


def divergence(setting: Setting, dtype: str) -> list[dict]:
    """Trains both sides in lockstep through an epoch; runs in a fresh process."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    import torch

    from benchmarks.jax_contenders import images
    from torch_ref import convert
    from torch_ref.model import VAE
    from torch_ref.train import losses
    from vae_jax import TrainConfig, create_state, draw_eps, shuffled_batches, train_epoch

    torch_dtype = getattr(torch, dtype)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with jax.enable_x64(True) if dtype == "float64" else contextlib.nullcontext():
        train_images = images(setting.images)
        state = create_state(TrainConfig())  # of that type
        model = VAE().to(device, torch_dtype)
        model.load_state_dict(convert.to_state_dict(jax.device_get(state.params)))
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        batches = shuffled_batches(state.key, 1, setting.images, setting.batch_size)
        on_device = jnp.asarray(train_images)
        draw = jax.jit(lambda key, step: draw_eps(key, step, (setting.batch_size, 20), jnp.dtype(dtype)))

        rows = []
        for start in range(0, len(batches), CHUNK):
            chunk = batches[start : start + CHUNK]
            noise = [np.array(draw(state.key, start + number)) for number in range(len(chunk))]
            state, sums = train_epoch(state, on_device, chunk)
            drift = 0.0
            for numbers, eps, ours in zip(np.asarray(chunk), noise, np.asarray(sums.loss), strict=True):
                numbers = numbers[numbers >= 0]
                pixels = torch.from_numpy(train_images[numbers]).to(device, torch_dtype) / 255
                recon, mu, logvar = model(pixels, torch.from_numpy(eps[: len(numbers)]).to(device))
                bce, kld = losses(recon, pixels, mu, logvar)
                optimizer.zero_grad()
                (bce + kld).backward()
                optimizer.step()
                theirs = (bce + kld).item()
                drift = max(drift, abs(float(ours) - theirs) / theirs)
            expected = convert.to_params(model.state_dict())
            differences = jax.tree.map(lambda a, b: np.abs(np.asarray(a) - b).max(), state.params, expected)
            rows.append(
                {
                    "steps": start + len(chunk),
                    "parameters": float(max(jax.tree.leaves(differences))),
                    "loss": drift,
                }
            )
    return rows


def train_ours(setting: Setting, seeds: int, epochs: int) -> list[dict]:
    """Our final losses from each seed; runs in a fresh process."""
    import jax.numpy as jnp
    import numpy as np

    from benchmarks.jax_contenders import images
    from vae_jax import TrainConfig, create_state, eval_epoch, load, shuffled_batches, split_batches, train_epoch

    train_images = jnp.asarray(images(setting.images))
    test_images = jnp.asarray(load().test_images.reshape(-1, 784))
    test_batches = split_batches(jnp.arange(len(test_images)), setting.batch_size)
    found = []
    for seed in range(seeds):
        state = create_state(TrainConfig(seed=seed))
        train_loss = math.nan
        for epoch in range(1, epochs + 1):
            batches = shuffled_batches(state.key, epoch, setting.images, setting.batch_size)
            state, sums = train_epoch(state, train_images, batches)
            train_loss = math.fsum(np.asarray(sums.loss).tolist()) / setting.images
        test = eval_epoch(state, test_images, test_batches)
        test_loss = math.fsum(np.asarray(test.loss).tolist()) / len(test_images)
        found.append({"train loss": train_loss, "test loss": test_loss})
    return found


def train_torch(setting: Setting, seeds: int, epochs: int) -> list[dict]:
    """PyTorch's final losses from each seed; runs in a fresh process."""
    import torch

    from benchmarks.torch_contenders import DEVICE, InMemoryTraining, pixels, summed_loss
    from torch_ref.model import VAE
    from vae_jax.data import load

    train_images = pixels(setting).to(DEVICE)
    test_images = torch.from_numpy(load().test_images.reshape(-1, 784)).to(DEVICE).float() / 255
    found = []
    for seed in range(seeds):
        torch.manual_seed(seed)
        model = VAE().to(DEVICE)
        training = InMemoryTraining(model, train_images, setting.batch_size)
        losses = [training.epoch() for _ in range(epochs)]
        with torch.no_grad():
            test = sum(summed_loss(model, batch).item() for batch in test_images.split(setting.batch_size))
        found.append({"train loss": losses[-1], "test loss": test / len(test_images)})
    return found
