"""The causes of a difference, part by part.

PyTorch gets what Flax computed before each part, so that a mistake in the encoder does not hide one in the loss.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from torch_ref import formulas
from torch_ref.formulas import Finding, same
from torch_ref.suspects import in_layers
from torch_ref.torch_side import MakeOptimizer, Record, TorchSide, Values, arrays


def causes(
    make_side: Callable[[], TorchSide],
    flax: Values,
    flax_layers: Mapping[str, Record],
    images: np.ndarray,
    eps: np.ndarray,
    make_optimizer: MakeOptimizer,
    steps: int,
) -> list[Finding]:
    """What is wrong in the encoder, z, the decoder, the loss; if nothing there, in the gradients; then in the steps.

    Args:
      make_side: Makes the PyTorch side, in float64, with the same weights as Flax.
      flax: Flax's values in float64.
      flax_layers: The calls of its layers, by their PyTorch names.
      images: Pixels in [0, 1], [batch, pixels].
      eps: Noise, [batch, latent].
      make_optimizer: Makes PyTorch's optimizer.
      steps: Optimizer steps.
    """
    side, pixels = make_side(), images.shape[1]
    mu, logvar, z, logits = (flax.outputs[name] for name in ("mu", "logvar", "z", "logits"))
    with torch.no_grad():
        tensors = [side.tensor(array) for array in (mu, logvar, eps)]
        heads = arrays(dict(zip(("mu", "logvar"), side.encode(images), strict=True)))
        drawn = side.reparameterize(*tensors).numpy()
        out = side.decode(side.tensor(z), pixels).numpy()
        expected = side.tensor(logits if side.returns_logits else flax.outputs["recon"])
        terms = arrays(side.loss(expected, side.tensor(images), *tensors[:2]))

    findings = formulas.in_heads({"mu": mu, "logvar": logvar}, heads)
    findings += [] if findings else in_layers(side, "encode", images, pixels, {"mu": mu, "logvar": logvar}, flax_layers)
    findings += formulas.in_z(mu, logvar, eps, drawn)
    in_output = formulas.in_output(logits, out, side.returns_logits)
    decoded = {"logits": logits} if side.returns_logits else {"recon": flax.outputs["recon"]}
    findings += in_output or in_layers(side, "decode", z, pixels, decoded, flax_layers)
    if not all(same(flax.terms[name], terms[name]) for name in terms.keys() & flax.terms.keys()):
        for name, found in (("PyTorch", terms), ("Flax", flax.terms)):
            findings += formulas.in_loss(name, found, logits, images, mu, logvar)
    if findings:
        return findings

    def run(settings: Mapping[str, Any]) -> Values:
        def changed(parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
            optimizer = make_optimizer(parameters)
            for group in optimizer.param_groups:
                group.update(settings)
            return optimizer

        return make_side().run(images, eps, changed, steps)

    theirs = run({})
    findings = formulas.in_gradients(flax.gradients, theirs.gradients)
    if findings or not steps:
        return findings
    keep = {key: formulas.well_conditioned(flax.gradients[key], theirs.gradients[key]) for key in theirs.gradients}

    def kept(parameters: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {key: parameters[key][keep[key]] for key in keep}

    ours, settings = kept(flax.parameters), make_optimizer([torch.nn.Parameter(torch.zeros(1))]).defaults
    return formulas.in_steps(ours, lambda changes: kept(run(changes).parameters), settings)
