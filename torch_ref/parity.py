"""Whether a Flax VAE and a PyTorch one are the same function; and if not, where they part and why.

    report = compare(FlaxVAE(), params, TorchVAE(), images)
    print(report)  # a table, and what was found
    assert report.equal

`python -m torch_ref.parity package.module:FlaxVAE package.module:TorchVAE --weights FILE` does the same. jax and torch
are imported when they are needed, so that `--help` and wrong options are answered at once.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from torch_ref import convert, rules
from torch_ref.layouts import LAYOUTS
from vae_jax.config import ParityConfig
from vae_jax.system import command_line
from vae_jax.system.console import say
from vae_jax.system.errors import InputError, reason
from vae_jax.system.given import import_class, json_object

if TYPE_CHECKING:
    import flax.linen as nn
    import optax
    import torch

    from torch_ref.formulas import Finding
    from torch_ref.torch_side import Loss, MakeOptimizer, Values

# The largest difference that counts as rounding, relative to the largest entry of an array.
BOUNDS = {
    "float64": {"output": 1e-10, "loss": 1e-10, "gradient": 1e-10, "parameter": 1e-10},
    "float32": {"output": 1e-5, "loss": 1e-5, "gradient": 1e-4, "parameter": 1e-4},
}
# Of arrays that are zero but for rounding, the differences are relative to this part of the largest entry of its kind.
FLOOR = 1e-3


class Row(NamedTuple):
    """A line of the table: how far PyTorch's array is from Flax's."""

    kind: str  # output, loss, gradient or parameter
    name: str
    dtype: str
    absolute: float  # the largest difference
    relative: float  # that, relative to the largest entry of PyTorch's array
    largest: float  # that entry

    @property
    def bound(self) -> float:
        return BOUNDS[self.dtype][self.kind]

    @property
    def holds(self) -> bool:
        return self.relative <= self.bound  # not if it is not a number


@dataclasses.dataclass(frozen=True)
class Report:
    """What a comparison found; `str` makes the table of it."""

    title: str
    rows: tuple[Row, ...]
    findings: tuple[Finding, ...]  # what is wrong, the first cause first
    notes: tuple[str, ...]

    @property
    def equal(self) -> bool:
        """Whether every difference is within its bound, and the weights are the same."""
        return not self.findings and all(row.holds for row in self.rows)

    def worst(self, kind: str, dtype: str) -> Row:
        """The row of a kind with the largest relative difference."""
        return max((row for row in self.rows if (row.kind, row.dtype) == (kind, dtype)), key=lambda row: row.relative)

    def __str__(self) -> str:
        by_name: dict[tuple[str, str], dict[str, Row]] = {}
        for row in self.rows:
            by_name.setdefault((row.kind, row.name), {})[row.dtype] = row
        labels = {key: key[1] if key[0] in ("output", "loss") else f"{key[0]} {key[1]}" for key in by_name}
        width = max(map(len, labels.values()), default=0)
        lines = [self.title, *self.notes]
        dtypes = dict.fromkeys(row.dtype for row in self.rows)
        lines.append(f"{'':{width}}" + "".join(f"  {dtype}: absolute  relative    bound" for dtype in dtypes))
        for key, rows in by_name.items():
            cells = "".join(f"  {r.absolute:17.1e}  {r.relative:8.1e}  {r.bound:7.0e}" for r in rows.values())
            parts = "" if all(row.holds for row in rows.values()) else "  DIFFERS"
            lines.append(f"{labels[key]:{width}}{cells}{parts}")
        lines += map(str, self.findings)
        lines.append("equal: every difference is within its bound" if self.equal else "NOT EQUAL")
        return "\n".join(lines)


def compare(
    flax_model: nn.Module,
    params: Mapping[str, Any],
    torch_module: torch.nn.Module,
    images: np.ndarray,
    *,
    batch_stats: Mapping[str, Any] | None = None,
    names: Mapping[str, str] | None = None,
    eps: np.ndarray | None = None,
    steps: int = 5,
    tx: optax.GradientTransformation | None = None,
    optimizer: MakeOptimizer | None = None,
    flax_loss: Loss | None = None,
    torch_loss: Loss | None = None,
    image_shape: Sequence[int] | None = None,
    dtypes: Sequence[str] = ("float64", "float32"),
) -> Report:
    """Compares a Flax VAE with a PyTorch one, in float64 and float32, and looks for the cause where they part.

    Both get the same images, noise and weights: outputs, loss terms, the gradient of each parameter, and the parameters
    after some Adam steps from the same start, on the same batch. Of the latter, entries whose first gradient is zero
    but for rounding are left out (`formulas.well_conditioned`): Adam makes whole steps of such errors. Nothing that is
    given is changed, nor are jax's and torch's settings. Both modules are taken in evaluation mode: batch statistics
    are used, and dropout is off.

    Args:
      flax_model: A module with the methods `encode(images) -> (mu, logvar)` and `decode(z) -> logits`.
      params: Its parameters, nested mappings of arrays.
      torch_module: A module with `encode` and `decode`, or `encoder` and `decoder`; perhaps with `reparameterize` and
        `loss`. `torch_ref.torch_side.TorchSide` describes what each may take and return. Its own weights are compared
        with `params`, key by key; `rules.for_module(rules.to_state_dict(params), torch_module)` is what it should hold.
      images: [batch, pixels]: pixels in [0, 1], or bytes.
      batch_stats: The Flax module's collection of that name, if it has one.
      names: PyTorch's names of layers that are called differently there, as for `rules.to_state_dict`. For the
        documented Flax parameters and a PyTorch module in a known layout they need not be given.
      eps: Noise, [batch, latent]; drawn from N(0, I) by default, always the same.
      steps: Optimizer steps; 0 leaves them out.
      tx: Flax's optimizer; `vae_jax.core.optimizer.adam(1e-3)` by default.
      optimizer: Makes PyTorch's, of a list of parameters; `torch.optim.Adam` with the rate 1e-3 by default.
      flax_loss: Of (logits, images, mu, logvar), jax arrays; `vae_jax.core.objective.losses` by default. It returns the
        loss, or (bce, kld), or (loss, bce, kld), summed over the batch or for each image.
      torch_loss: Of (recon, images, mu, logvar), tensors, where `recon` is what the module's `decode` returns, as
        [batch, pixels]; it returns the same. The module's `loss` by default, or else the documented loss.
      image_shape: The shape that PyTorch's encoder takes an image in, such as (1, 28, 28); [pixels] by default.
      dtypes: What to compute in; without float64, causes are not looked for.

    Returns:
      The table, with the verdict by `BOUNDS`, and the findings.

    Raises:
      WeightsError: The two do not have the same parameters; names the first key at fault.
      InputError: A module lacks a method, fails, or returns something of another shape than it should.
    """
    import torch

    from torch_ref import flax_side, formulas
    from torch_ref.torch_side import TorchSide, arrays

    images = np.asarray(images)
    if images.ndim != 2 or not len(images):
        raise InputError(f"images: have shape {list(images.shape)}; expected [batch, pixels]")
    images = images / 255 if images.dtype == np.uint8 else images.astype(np.float64)
    pixels = images.shape[1]
    variables = {"params": params, **({"batch_stats": batch_stats} if batch_stats else {})}
    flax_side.shapes(flax_model, pixels)
    latent_dim = flax_side.latent_dim(flax_model, variables, pixels)
    eps = np.random.default_rng(0).normal(size=(len(images), latent_dim)) if eps is None else np.asarray(eps)

    names = known_names(torch_module) if names is None else names
    transposed = rules.transposed_layers(torch_module)
    places = rules.entries(variables, transposed, names)
    converted = rules.for_module(rules.to_state_dict(params, batch_stats, transposed, names), torch_module)
    findings = formulas.in_weights(arrays(torch_module.state_dict()), arrays(converted))

    returns_logits = False
    make_optimizer = optimizer or (lambda parameters: torch.optim.Adam(parameters, lr=1e-3))

    def torch_side(dtype: str, own_weights: bool = False) -> TorchSide:
        side = TorchSide(torch_module, getattr(torch, dtype), torch_loss, image_shape)
        if not own_weights:
            side.module.load_state_dict(converted)
        side.returns_logits = returns_logits
        return side

    returns_logits = torch_side("float64").finds_logits(images, eps)
    notes = [
        f"{type(torch_module).__name__}: decodes to {'logits' if returns_logits else 'means of pixels, in [0, 1]'}"
    ]
    rows: list[Row] = []
    exact: list[Values] = []
    for dtype in dtypes:
        ours = flax_side.run(flax_model, variables, places, images, eps, dtype, flax_loss, tx, steps)
        # Where the weights are the same, float32 modules get all digits of them.
        theirs = torch_side(dtype, own_weights=bool(findings)).run(images, eps, make_optimizer, steps)
        exact += [ours] if dtype == "float64" else []
        rows += _rows(dtype, ours, theirs)
        found = ours.outputs["mu"].dtype
        notes += [f"{type(flax_model).__name__}: computes in {found}, given {dtype}"] if found != dtype else []
    if exact and not all(row.holds for row in rows):
        from torch_ref.causes import causes

        layers = flax_side.layers(flax_model, variables, images, exact[0].outputs["z"], names)
        causing = causes(lambda: torch_side("float64"), exact[0], layers, images, eps, make_optimizer, steps)
        findings += causing or ([] if findings else _unexplained(rows))
    title = f"{type(flax_model).__name__} (Flax) and {type(torch_module).__name__} (PyTorch), {len(images)} images"
    return Report(title, tuple(rows), tuple(findings), tuple(notes))


def known_names(module: torch.nn.Module) -> dict[str, str]:
    """PyTorch's names of the documented layers in a module that has them in another known layout; else none."""
    keys = set(module.state_dict())
    for layers in LAYOUTS.values():
        if keys == {f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}:
            return dict(zip(LAYOUTS["documented"], layers, strict=True))
    return {}


def _rows(dtype: str, ours: Values, theirs: Values) -> list[Row]:
    from torch_ref.formulas import well_conditioned

    rows = []
    for kind, group in zip(("output", "loss", "gradient", "parameter"), ours._fields, strict=True):
        mine, other = getattr(ours, group), getattr(theirs, group)
        # A loss may be without its terms, and not every decoder has logits.
        arrays = {name: (mine[name].astype(np.float64), value) for name, value in other.items() if name in mine}
        floor = FLOOR * max((np.abs(value).max(initial=0) for _, value in arrays.values()), default=0.0)
        for name, (found, expected) in arrays.items():
            if kind == "parameter":
                keep = well_conditioned(ours.gradients[name], theirs.gradients[name])
                found, expected = found[keep], expected[keep]
            absolute = float(np.abs(found - expected).max(initial=0))
            largest = float(np.abs(expected).max(initial=0))
            relative = absolute / max(largest, floor) if absolute else 0.0
            rows.append(Row(kind, name, dtype, absolute, relative, largest))
    return rows


def _unexplained(rows: list[Row]) -> list[Finding]:
    from torch_ref.formulas import Finding

    row = next(row for row in rows if not row.holds)
    kind = "unexplained" if row.dtype == "float64" else "more than rounding in float32, though not in float64"
    return [Finding(kind, row.name, f"the {row.kind} differs by {row.absolute:.2g}")]


def parity(config: ParityConfig) -> None:
    """Compares the two classes that the options name, and prints the table; exits with 1 if they differ.

    Raises:
      InputError: An option, a class or a file cannot be used.
    """
    config.check()
    flax_model = _instance(config.flax, "--flax-options", config.flax_options)
    module = _instance(config.torch, "--torch-options", config.torch_options)
    names = json_object("--names", config.names)

    import flax.linen as nn
    import torch

    for option, value, kind in ((config.flax, flax_model, nn.Module), (config.torch, module, torch.nn.Module)):
        if not isinstance(value, kind):
            raise InputError(f"{option}: is no {'Flax' if kind is nn.Module else 'PyTorch'} module; name its class")

    from torch_ref import flax_side
    from vae_jax.data import load

    dataset = load(config.data, config.data_dir, config.max_data_gb, config.image_size, config.grey)
    images = dataset.test_images[: config.images].reshape(min(config.images, len(dataset.test_images)), -1)
    if config.weights is not None:
        with convert.explain_errors(config.weights):
            given = convert.model_of(convert.read(config.weights), module.state_dict().keys())
            module.load_state_dict(rules.for_module(given, module))
    like = flax_side.shapes(flax_model, images.shape[1])
    names = known_names(module) | names
    weights = {key: tensor for key, tensor in module.state_dict().items() if not key.endswith(rules.COUNTER)}
    variables = rules.to_variables(weights, like, rules.transposed_layers(module), names)
    report = compare(
        flax_model,
        variables["params"],
        module,
        images,
        batch_stats=variables.get("batch_stats"),
        names=names,
        steps=config.steps,
        image_shape=config.image_shape or None,
    )
    say(*str(report).splitlines())
    if not report.equal:
        sys.exit(1)


def _instance(name: str, option: str, options: str) -> Any:
    """An instance of a class, which need not be a module yet."""
    found, arguments = import_class(name, name), json_object(option, options)
    try:
        return found(**arguments)
    except Exception as error:  # a user's class may raise anything
        raise InputError(f"{option} {options}: {name} cannot be made with them ({reason(error)})") from None


def main() -> None:
    command_line.run(parity, ParityConfig, "python -m torch_ref.parity")


if __name__ == "__main__":
    main()
