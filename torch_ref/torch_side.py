"""A PyTorch VAE as one side of a comparison, whatever its author called the parts: see `TorchSide`."""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from vae_jax.system.errors import InputError, reason

Loss = Callable[..., Any]
# Makes the optimizer of a list of parameters.
MakeOptimizer = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


class Values(NamedTuple):
    """What one side computes from the same weights, images and noise; keys and shapes as PyTorch has them."""

    outputs: dict[str, np.ndarray]  # mu, logvar, z, logits where both sides have them, recon
    terms: dict[str, np.ndarray]  # loss, and bce and kld where the loss function tells them apart
    gradients: dict[str, np.ndarray]
    parameters: dict[str, np.ndarray]  # after the optimizer's steps


class Record(NamedTuple):
    """The first call of a layer."""

    input: Any  # an array or a tensor
    output: Any


# Makes another input of a layer, of the records so far and of the input that it would have.
ChangedInput = Callable[[dict[str, Record], Tensor], Tensor]


def loss_terms(returned: Any) -> dict[str, Any]:
    """The terms of what a loss function returns: the loss; bce and kld; or loss, bce and kld. Each is summed.

    Raises:
      InputError: It returns something else.
    """
    parts = tuple(returned) if isinstance(returned, tuple | list) else (returned,)
    names = {1: ("loss",), 2: ("bce", "kld"), 3: ("loss", "bce", "kld")}.get(len(parts))
    if names is None or not all(hasattr(part, "sum") for part in parts):
        raise InputError(
            f"the loss function returns {type(returned).__name__}; expected loss, (bce, kld) or (loss, bce, kld)"
        )
    terms = {name: part.sum() for name, part in zip(names, parts, strict=True)}
    return terms if "loss" in terms else {"loss": terms["bce"] + terms["kld"], **terms}


class FixedNoise(TorchFunctionMode):
    """Within the block, torch.randn_like and torch.randn return `eps`, so that noise drawn inside a module is known."""

    def __init__(self, eps: Tensor):
        super().__init__()
        self.eps = eps

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        return self.eps if func in (torch.randn_like, torch.randn) else func(*args, **(kwargs or {}))


class TorchSide:
    """A copy of a PyTorch module, on the CPU, in evaluation mode, in float32 or float64.

    The module has

    - `encode(images)`, or a submodule or function `encoder`: returns (mu, logvar), [batch, latent] each;
    - `decode(z)`, or `decoder`: returns the logits of the pixels, or their means in [0, 1]; any shape [batch, ...] of
      as many values as an image has pixels. Values outside [0, 1] mean logits;
    - `decoder.logits(z)`, if it has that: the logits, where `decoder` returns means;
    - `reparameterize(mu, logvar, eps)`, or `(mu, logvar)` with noise of torch.randn_like or torch.randn, if it has
      that; otherwise z = mu + exp(logvar / 2) * eps;
    - `loss(recon, images, mu, logvar)`, if it has that, as `loss_terms` describes it; `recon` is what `decode` returns,
      as [batch, pixels]. Otherwise the documented loss.
    """

    def __init__(
        self,
        module: nn.Module,
        dtype: torch.dtype,
        loss: Loss | None = None,
        image_shape: Sequence[int] | None = None,
    ):
        self.name = type(module).__name__
        self.module = copy.deepcopy(module).to("cpu", dtype).eval()
        self.dtype = dtype
        self.own_loss = loss
        self.image_shape = image_shape
        self.returns_logits = False
        self._encode, self._decode = (self._find(names) for names in (("encode", "encoder"), ("decode", "decoder")))

    def _find(self, names: tuple[str, str]) -> str:
        for name in names:
            if callable(getattr(self.module, name, None)):
                return name
        takes, returns = ("images", "(mu, logvar)") if names[0] == "encode" else ("z", "logits or means of the pixels")
        raise InputError(
            f"{self.name}: has neither {names[0]} nor {names[1]}; expected {names[0]}({takes}) -> {returns}"
        )

    def tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.array(array)).to(self.dtype)

    def encode(self, images: np.ndarray) -> tuple[Tensor, Tensor]:
        """Maps pixels, [batch, pixels], to mu and logvar, [batch, latent] each."""
        pixels = self.tensor(images)
        if self.image_shape is not None:
            pixels = pixels.reshape(len(pixels), *self.image_shape)
        with self.explained(self._encode, pixels):
            returned = getattr(self.module, self._encode)(pixels)
        pair = isinstance(returned, tuple | list) and len(returned) == 2
        shapes = [list(part.shape) for part in returned] if pair else type(returned).__name__
        if not pair or shapes[0] != shapes[1] or len(shapes[0]) != 2 or shapes[0][0] != len(images):
            raise InputError(
                f"{self.name}: {self._encode} returns {shapes}; expected mu and logvar, [batch, latent] each"
            )
        return returned[0], returned[1]

    def reparameterize(self, mu: Tensor, logvar: Tensor, eps: Tensor) -> Tensor:
        draw = getattr(self.module, "reparameterize", None)
        if draw is None:
            return mu + torch.exp(logvar / 2) * eps
        with self.explained("reparameterize", mu), FixedNoise(eps):
            return draw(mu, logvar, eps) if len(inspect.signature(draw).parameters) > 2 else draw(mu, logvar)

    def decode(self, z: Tensor, pixels: int) -> Tensor:
        """Maps z, [batch, latent], to logits or means, [batch, pixels]."""
        with self.explained(self._decode, z):
            out = getattr(self.module, self._decode)(z)
        if not isinstance(out, Tensor) or out.shape[:1] != z.shape[:1] or out.numel() != len(z) * pixels:
            found = list(out.shape) if isinstance(out, Tensor) else type(out).__name__
            raise InputError(f"{self.name}: {self._decode} returns {found}; expected [{len(z)}, {pixels}]")
        return out.reshape(len(z), pixels)

    def logits(self, z: Tensor, out: Tensor) -> Tensor | None:
        """The logits, unless only the means are to be had."""
        inner = getattr(getattr(self.module, "decoder", None), "logits", None)
        if not self.returns_logits and self._decode == "decoder" and callable(inner):
            logits = inner(z)
            return logits.reshape(out.shape) if isinstance(logits, Tensor) else None
        return out if self.returns_logits else None

    def recon(self, out: Tensor) -> Tensor:
        return torch.sigmoid(out) if self.returns_logits else out

    def loss(self, out: Tensor, images: Tensor, mu: Tensor, logvar: Tensor) -> dict[str, Tensor]:
        own = self.own_loss or getattr(self.module, "loss", None)
        if own is None:
            cross_entropy = F.binary_cross_entropy_with_logits if self.returns_logits else F.binary_cross_entropy
            kld = -0.5 * torch.sum(1 + logvar - mu**2 - torch.exp(logvar))
            return loss_terms((cross_entropy(out, images, reduction="sum"), kld))
        with self.explained("loss", out):
            try:
                return loss_terms(own(out, images, mu, logvar))
            except RuntimeError as error:
                if "between 0 and 1" not in str(error):
                    raise
                raise InputError(
                    f"{self.name}: missing sigmoid: {self._decode} returns values outside [0, 1], and its loss takes"
                    " means; expected a sigmoid after the last layer, or binary_cross_entropy_with_logits"
                ) from None

    @contextlib.contextmanager
    def explained(self, method: str, argument: Tensor) -> Iterator[None]:
        try:
            yield
        except InputError:
            raise
        except Exception as error:  # a user's module may raise anything
            hint = "; name the shape of an image with --image-shape" if method == self._encode else ""
            raise InputError(f"{self.name}: {method} fails on {list(argument.shape)} ({reason(error)}){hint}") from None

    def forward(self, images: np.ndarray, eps: np.ndarray) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The outputs and the loss terms."""
        mu, logvar = self.encode(images)
        z = self.reparameterize(mu, logvar, self.tensor(eps))
        out = self.decode(z, images.shape[1])
        outputs = {"mu": mu, "logvar": logvar, "z": z, "recon": self.recon(out)}
        if (logits := self.logits(z, out)) is not None:
            outputs["logits"] = logits
        return outputs, self.loss(out, self.tensor(images), mu, logvar)

    def finds_logits(self, images: np.ndarray, eps: np.ndarray) -> bool:
        """Runs all but the loss, and tells whether `decode` returns logits: some value is outside [0, 1]."""
        with torch.no_grad():
            mu, logvar = self.encode(images)
            if mu.shape != eps.shape:
                raise InputError(
                    f"{self.name}: has {mu.shape[1]} latent dimensions; expected {eps.shape[1]}, as the Flax module has"
                )
            out = self.decode(self.reparameterize(mu, logvar, self.tensor(eps)), images.shape[1])
        return bool((out < 0).any() or (out > 1).any())

    def run(self, images: np.ndarray, eps: np.ndarray, make_optimizer: MakeOptimizer, steps: int) -> Values:
        """Everything that is compared; changes the copy's parameters."""
        parameters = dict(self.module.named_parameters())
        optimizer = make_optimizer(list(parameters.values()))
        outputs, terms = self.forward(images, eps)
        first = Values(arrays(outputs), arrays(terms), {}, {})
        for step in range(max(steps, 1)):
            if step:
                optimizer.zero_grad()
                terms = self.forward(images, eps)[1]
            if terms["loss"].requires_grad:
                terms["loss"].backward()
            if step == 0:
                gradients = {key: value.grad for key, value in parameters.items()}
                zeros = {key: torch.zeros_like(value) for key, value in parameters.items()}
                first = first._replace(
                    gradients=arrays({key: zeros[key] if g is None else g for key, g in gradients.items()})
                )
            if steps:
                optimizer.step()
        return first._replace(parameters=arrays(parameters) if steps else {})

    def trace(
        self,
        part: str,
        given: np.ndarray,
        pixels: int,
        inputs: Mapping[str, ChangedInput] | None = None,
        attributes: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> tuple[tuple[Tensor, ...], dict[str, Record]]:
        """Runs one part, and records the first call of every layer with parameters in it, in their order.

        Args:
          part: `encode` or `decode`.
          given: Images or latents.
          pixels: Pixels of an image.
          inputs: Other inputs for layers, by their names.
          attributes: Other attributes for layers, by their names; for this run only.

        Returns:
          mu and logvar, or what `decode` returns; and the records.
        """
        records: dict[str, Record] = {}
        layers = {name: layer for name, layer in self.module.named_modules() if [*layer.parameters(recurse=False)]}
        with contextlib.ExitStack() as stack, torch.no_grad():
            for name, change in (inputs or {}).items():

                def replace(_: Any, args: Any, change: ChangedInput = change) -> Any:
                    return (change(records, args[0]), *args[1:])

                stack.callback(layers[name].register_forward_pre_hook(replace).remove)
            for name, changed in (attributes or {}).items():
                for attribute, value in changed.items():
                    stack.callback(setattr, layers[name], attribute, getattr(layers[name], attribute))
                    setattr(layers[name], attribute, value)
            for name, layer in layers.items():

                def record(_: Any, args: Any, output: Any, name: str = name) -> None:
                    if args and isinstance(args[0], Tensor) and isinstance(output, Tensor):
                        # A copy: an activation may work in place.
                        records.setdefault(name, Record(args[0].clone(), output.clone()))

                stack.callback(layer.register_forward_hook(record).remove)
            return self.encode(given) if part == "encode" else (self.decode(self.tensor(given), pixels),), records


def arrays(tensors: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """Copies of tensors on the CPU, as arrays."""
    return {name: np.array(tensor.detach().cpu().numpy()) for name, tensor in tensors.items()}
