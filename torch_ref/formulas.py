"""The usual mistakes outside the layers: in weights, z, output, loss and optimizer, each tried as a formula."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

# Two float64 arrays are the same up to this difference, relative to the largest entry.
SAME = 1e-9
Arrays = Mapping[str, np.ndarray]


class Finding(NamedTuple):
    """What is wrong, in a few words; where: a layer, a key or a quantity; and what each side does."""

    kind: str
    where: str
    says: str

    def __str__(self) -> str:
        return f"{self.where}: {self.kind}: {self.says}"


def difference(a: Any, b: Any) -> float:
    """The largest absolute difference; infinite if one is not a number."""
    worst = float(np.abs(np.asarray(a, np.float64) - b).max(initial=0))
    return worst if np.isfinite(worst) else np.inf


def same(a: Any, b: Any) -> bool:
    """Whether two arrays have the same shape and, up to rounding in float64, the same values."""
    return np.shape(a) == np.shape(b) and difference(a, b) <= SAME * float(np.abs(b).max(initial=0))


def well_conditioned(flax: np.ndarray, torch: np.ndarray) -> np.ndarray:
    """Where a parameter's two first gradients are zero, or far above their rounding errors.

    Adam's first step is the rate times the gradient's sign: where the gradient is zero but for rounding, rounding
    decides it.
    """
    largest = np.abs(torch).max(initial=0)
    smallest = (1e-6 if torch.dtype == np.float64 else 1e-3) * largest
    return (np.abs(torch) >= smallest) | ((flax == 0) & (torch == 0))


def in_weights(own: Arrays, expected: Arrays) -> list[Finding]:
    """Why the PyTorch module's own weights are not those of Flax, converted by rule; a finding for each key."""
    findings = []
    for key, right in expected.items():
        found = own[key]
        # A float32 module cannot hold the float64 values.
        if found.shape == right.shape and difference(found.astype(np.float32), right.astype(np.float32)) == 0:
            continue
        kind, says = next(_why_weights(key, found, right, expected), ("other values", "are not those of Flax"))
        findings.append(Finding(kind, key, f"{says} (differs by {difference(found, right):.2g})"))
    return findings


def _why_weights(key: str, found: np.ndarray, right: np.ndarray, expected: Arrays) -> Iterator[tuple[str, str]]:
    def is_it(candidate: np.ndarray) -> bool:
        return candidate.shape == found.shape and np.allclose(candidate, found, rtol=1e-6, atol=0)

    if found.ndim >= 2 and is_it(np.swapaxes(right, 0, 1)):
        yield "transposed kernel", "has inputs and outputs exchanged"
    if found.ndim == 4 and is_it(np.swapaxes(right, 2, 3)):
        yield "transposed kernel", "has height and width exchanged"
    if found.ndim > 2 and is_it(np.flip(right, tuple(range(2, found.ndim)))):
        yield "flipped kernel", "runs backwards in space"
    for axis in range(min(found.ndim, 2)):
        size = right.shape[axis]
        for channels in (c for c in range(2, size // 2 + 1) if size % c == 0):
            split = (*right.shape[:axis], channels, size // channels, *right.shape[axis + 1 :])
            if is_it(np.swapaxes(right.reshape(split), axis, axis + 1).reshape(right.shape)):
                order = f"{channels} channels of {size // channels} values"
                yield (
                    "channel order in a flatten",
                    f"has Flax's {'inputs' if axis else 'outputs'} in another order, {order}",
                )
    for other, values in expected.items():
        if other != key and is_it(values):
            yield "exchanged layers", f"has the values of {other}"
    if not found.any():
        yield "dropped bias" if found.ndim == 1 else "zero weights", "is zero"
    elif (ratio := _ratio(found, right)) is not None:
        yield "scaled weights", f"is {ratio:g} times Flax's"


def in_heads(flax: Arrays, torch: Arrays) -> list[Finding]:
    """Why the encoder's outputs differ, if a formula tells."""
    if same(flax["mu"], torch["logvar"]) and same(flax["logvar"], torch["mu"]):
        return [Finding("exchanged outputs", "mu, logvar", "the encoder returns mu and logvar in another order")]
    if same(flax["mu"], torch["mu"]):
        logvar = flax["logvar"]
        forms = {
            "the logarithm of the standard deviation": logvar / 2,
            "the standard deviation": np.exp(logvar / 2),
            "the variance": np.exp(logvar),
        }
        for what, values in forms.items():
            if same(values, torch["logvar"]):
                return [Finding("logvar taken for something else", "logvar", f"PyTorch's is {what}")]
    return []


def in_z(mu: np.ndarray, logvar: np.ndarray, eps: np.ndarray, torch: np.ndarray) -> list[Finding]:
    """Why PyTorch draws another z from the same mu, logvar and noise."""
    if same(mu + np.exp(logvar / 2) * eps, torch):
        return []
    forms = {
        "logvar taken for the standard deviation": ("mu + logvar * eps", mu + logvar * eps),
        "missing 1/2": ("mu + exp(logvar) * eps", mu + np.exp(logvar) * eps),
        "missing noise": ("mu, as some modules do in evaluation mode", mu),
        "wrong sign": ("mu + exp(-logvar / 2) * eps", mu + np.exp(-logvar / 2) * eps),
        "doubled standard deviation": ("mu + 2 * exp(logvar / 2) * eps", mu + 2 * np.exp(logvar / 2) * eps),
    }
    for kind, (form, values) in forms.items():
        if same(values, torch):
            return [Finding(kind, "z", f"PyTorch computes {form}; expected mu + exp(logvar / 2) * eps")]
    worst = difference(mu + np.exp(logvar / 2) * eps, torch)
    return [Finding("unexplained", "z", f"differs by {worst:.2g} from mu + exp(logvar / 2) * eps")]


def in_output(logits: np.ndarray, torch: np.ndarray, returns_logits: bool) -> list[Finding]:
    """Why the decoder's output differs from Flax's logits, or from their sigmoid, if a formula tells."""
    if same(logits if returns_logits else _sigmoid(logits), torch):
        return []
    if same(logits, torch):
        says = "Flax's decode applies the sigmoid, and the loss applies it again; expected logits"
        return [Finding("sigmoid applied twice", "recon", says)]
    forms = {
        "sigmoid(sigmoid(logits))": ("sigmoid applied twice", _sigmoid(_sigmoid(logits))),
        "tanh(logits)": ("another output activation", np.tanh(logits)),
        "(tanh(logits) + 1) / 2": ("another output activation", (np.tanh(logits) + 1) / 2),
        "clip(logits, 0, 1)": ("another output activation", np.clip(logits, 0, 1)),
    }
    for form, (kind, values) in forms.items():
        if same(values, torch):
            return [Finding(kind, "recon", f"PyTorch computes {form}; expected sigmoid(logits)")]
    return []


def in_loss(
    side: str, terms: Arrays, logits: np.ndarray, images: np.ndarray, mu: np.ndarray, logvar: np.ndarray
) -> list[Finding]:
    """Why a side's loss terms are not the documented ones of these values.

    Args:
      side: Flax or PyTorch.
      terms: What its loss function returned for them: loss, and perhaps bce and kld.
      logits: [batch, pixels].
      images: [batch, pixels].
      mu: [batch, latent].
      logvar: [batch, latent].
    """
    bces, klds = _bces(logits, images), _klds(mu, logvar, images.shape[1])
    bce, kld = bces[""], klds[""]
    loss = float(terms["loss"])
    beta = (loss - bce) / kld if kld else 1.0
    weighted = Finding("weight of the KLD", "loss", f"{side} computes bce + {beta:g} * kld; expected bce + kld")
    if "bce" in terms:
        findings = _why_term(side, "bce", float(terms["bce"]), bces) + _why_term(side, "kld", float(terms["kld"]), klds)
        return findings or ([] if same(bce + kld, loss) else [weighted])
    if same(bce + kld, loss):
        return []
    for how_bce, one in bces.items():
        for how_kld, other in klds.items():
            if same(one + other, loss):
                named = [Finding(*_named(side, "bce", how_bce))] if how_bce else []
                return named + ([Finding(*_named(side, "kld", how_kld))] if how_kld else [])
    mean = {"": bce + kld, "mean instead of sum: as the mean over the batch": (bce + kld) / len(images)}
    parts = _why_term(side, "loss", loss, mean)
    return [weighted] if parts[0].kind == "unexplained" and abs(beta - round(beta, 6)) < 1e-9 * abs(beta) else parts


def _why_term(side: str, term: str, value: float, forms: Mapping[str, float]) -> list[Finding]:
    for how, values in forms.items():
        if same(values, value):
            return [Finding(*_named(side, term, how))] if how else []
    ratio = value / forms[""]
    return [Finding("unexplained", term, f"{side}'s is {ratio:.6g} times the documented {term}")]


def _named(side: str, term: str, how: str) -> tuple[str, str, str]:
    kind, _, detail = how.partition(": ")
    return kind, term, f"{side} computes it {detail}"


def _bces(logits: np.ndarray, images: np.ndarray) -> dict[str, float]:
    """Cross entropies of a batch, as documented and with each usual mistake."""

    def bce(logits: np.ndarray, images: np.ndarray) -> float:
        return float(np.sum(np.logaddexp(0, logits) - logits * images))

    right, recon = bce(logits, images), _sigmoid(logits)
    squares = float(np.sum((recon - images) ** 2))
    return {
        "": right,
        "mean instead of sum: as the mean over pixels and batch": right / images.size,
        "mean instead of sum: as the mean over the batch": right / len(images),
        "mean instead of sum: as the mean over pixels, summed over the batch": right / images.shape[1],
        "sigmoid applied twice: of sigmoid(recon); recon is the sigmoid of the logits already": bce(recon, images),
        "missing sigmoid: of the logits as if they were means": _bce_of_means(logits, images),
        "scaled pixels: with pixels divided by 255": bce(logits, images / 255),
        "scaled pixels: with pixels times 255": bce(logits, images * 255),
        "wrong sign: with the other sign": -right,
        "squared error: as a sum of squared errors": squares,
        "squared error: as half a sum of squared errors": squares / 2,
        "squared error: as a mean of squared errors": squares / images.size,
        "exchanged arguments: with recon and images exchanged": _bce_of_means(images, recon),
    }


def _bce_of_means(recon: np.ndarray, images: np.ndarray) -> float:
    """PyTorch's cross entropy of means, whose logarithms are at least -100."""
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.maximum(np.log(recon), -100), np.maximum(np.log(1 - recon), -100)
    return -float(np.sum(images * logs[0] + (1 - images) * logs[1]))


def _klds(mu: np.ndarray, logvar: np.ndarray, pixels: int) -> dict[str, float]:
    """Divergences of a batch, as documented and with each usual mistake."""

    def kld(logvar: np.ndarray, one: float = 1.0) -> float:
        return -0.5 * float(np.sum(one + logvar - mu**2 - np.exp(logvar)))

    right = kld(logvar)
    with np.errstate(divide="ignore"):
        deviations = kld(np.log(logvar**2))
    return {
        "": right,
        "missing 1/2: without the factor 1/2": 2 * right,
        "mean instead of sum: as the mean over latent dimensions and batch": right / mu.size,
        "mean instead of sum: as the mean over the batch": right / len(mu),
        "mean instead of sum: as the mean over latent dimensions, summed over the batch": right / mu.shape[1],
        "mean instead of sum: as the mean over the batch, divided by the pixels": right / len(mu) / pixels,
        "wrong sign: with the other sign": -right,
        "wrong constant: without the 1": kld(logvar, 0),
        "logvar taken for the standard deviation: with logvar for the standard deviation": deviations,
        "logvar taken for the standard deviation: with logvar for its logarithm": kld(2 * logvar),
        "wrong sign: with + mu^2 in the place of - mu^2": right + float(-np.sum(mu**2)),
    }


def in_gradients(flax: Arrays, torch: Arrays) -> list[Finding]:
    """Why gradients differ though the loss is the same: of the first key."""
    largest = max((np.abs(value).max(initial=0) for value in torch.values()), default=0.0)
    for key, expected in torch.items():
        found = flax[key]
        if difference(found, expected) <= SAME * max(np.abs(expected).max(initial=0), 1e-3 * largest):
            continue
        for side, gradient, other in (("Flax", found, expected), ("PyTorch", expected, found)):
            if not gradient.any() and other.any():
                return [
                    Finding("cut gradient", key, f"{side}'s gradient is zero: stop_gradient, detach, or a layer unused")
                ]
        ratio = _ratio(found, expected)
        says = f"Flax's is {ratio:g} times PyTorch's" if ratio else f"differs by {difference(found, expected):.2g}"
        return [Finding("another gradient", key, f"{says}, though the losses agree")]
    return []


def in_steps(flax: Arrays, run: Callable[[dict[str, Any]], Arrays], settings: Mapping[str, Any]) -> list[Finding]:
    """Why the parameters after the optimizer's steps differ though the gradients are the same.

    Args:
      flax: Flax's parameters.
      run: PyTorch's parameters after its own steps, with some settings of the optimizer changed.
      settings: The optimizer's settings.
    """
    theirs = run({})
    # Tighter than `same`: another eps changes a few steps by little.
    if all(difference(flax[key], theirs[key]) <= 1e-10 * np.abs(theirs[key]).max(initial=0) for key in theirs):
        return []
    changes: list[tuple[str, Any]] = [("eps", eps) for eps in (1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3)]
    changes += [("betas", betas) for betas in ((0.9, 0.999), (0.9, 0.99), (0.9, 0.95), (0.5, 0.999), (0.99, 0.999))]
    changes += [("lr", settings["lr"] * factor) for factor in (0.1, 0.5, 2, 10)] + [("lr", 1e-3)]
    changes += [("weight_decay", decay) for decay in (0.0, 1e-4, 1e-2)]
    tried: list[tuple[float, str, Any]] = []
    for name, value in changes:
        if name in settings and settings[name] != value:
            found = run({name: value})
            tried.append((max(difference(flax[key], found[key]) for key in found), name, value))
    worst, name, value = min(tried, key=lambda each: each[0], default=(np.inf, "", None))
    if worst <= SAME:
        says = f"Flax's steps are those of {name} {value}, PyTorch has {settings[name]}"
        return [Finding("another optimizer setting", name, says)]
    return [Finding("unexplained", "parameters", "the optimizers part, though the gradients agree")]


def _ratio(a: np.ndarray, b: np.ndarray) -> float | None:
    """The number that a is times b, if there is one."""
    norm = float(np.sum(b * b))
    ratio = float(np.sum(a * b)) / norm if norm else 0.0
    return ratio if ratio and np.allclose(a, ratio * b, rtol=1e-5, atol=1e-6 * np.abs(a).max(initial=0)) else None


def _sigmoid(logits: np.ndarray) -> np.ndarray:
    return np.exp(-np.logaddexp(0, -logits))
