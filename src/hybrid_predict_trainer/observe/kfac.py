"""Kronecker factors of the curvature of linear and convolutional layers (K-FAC, arXiv 1503.05671).

For a layer s = W a the Fisher matrix of W is about A x G (Kronecker), with

    A = E[a a']   of its inputs        G = E[g g']   of the gradients at its outputs,

kept as exponential means, gathered by hooks during training's own passes.  A convolution is a linear
layer on patches, summed over positions (KFC, arXiv 1602.01407).  The largest factors are kept as their
diagonals where all would exceed the memory limit.

Letters: ``B`` samples, ``T`` positions (tokens, pixels), ``I`` inputs (one more with a bias), ``O`` outputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle

from ..records import StateDict
from ..weights import algebra as weights

Layer = nn.Linear | nn.Conv2d


def layer_inputs(layer: Layer, inputs: Tensor) -> Tensor:
    """(B, ..., I) what the weights multiply: rows over samples and positions, a 1 appended for the bias."""
    if isinstance(layer, nn.Conv2d):
        if layer.groups != 1 or isinstance(layer.padding, str):
            raise ValueError("grouped convolutions and padding by name have no single Kronecker factor here")
        patches = functional.unfold(inputs, layer.kernel_size, layer.dilation, layer.padding, layer.stride)
        rows = patches.transpose(1, 2).flatten(0, 1)  # (B * T, channels * kernel)
    else:
        rows = inputs.reshape(-1, inputs.shape[-1])
    if layer.bias is not None:
        rows = torch.cat([rows, rows.new_ones(len(rows), 1)], dim=1)
    return rows


def output_gradients(layer: Layer, gradients: Tensor) -> Tensor:
    """(B * T, O) from the gradient at the output of a layer."""
    if isinstance(layer, nn.Conv2d):
        return gradients.transpose(1, -1).flatten(0, 2)
    return gradients.reshape(-1, gradients.shape[-1])


def second_moment(rows: Tensor, num_samples: int, *, diagonal: bool) -> Tensor:
    """Sum of r r' over the rows, over the number of samples: (F, F), or (F,) if only its diagonal is kept."""
    rows = rows.float()
    return rows.square().sum(dim=0) / num_samples if diagonal else rows.mT @ rows / num_samples


def factor_sizes(layer: Layer) -> tuple[int, int]:
    """(I, O) of a layer."""
    bias = int(layer.bias is not None)
    if isinstance(layer, nn.Conv2d):
        return layer.in_channels * math.prod(layer.kernel_size) + bias, layer.out_channels
    return layer.in_features + bias, layer.out_features


def diagonal_factors(sizes: Mapping[str, tuple[int, int]], max_bytes: int) -> set[tuple[str, str]]:
    """Which factors, as (layer, "A" or "G"), are kept as diagonals so that all together fit: the largest first."""
    factors = [(size, name, kind) for name, pair in sizes.items() for size, kind in zip(pair, "AG", strict=True)]
    total, chosen = sum(4 * size * size for size, _, _ in factors), set()
    for size, name, kind in sorted(factors, key=lambda f: -f[0]):
        if total <= max_bytes:
            break
        chosen.add((name, kind))
        total += 4 * size - 4 * size * size
    return chosen


class KfacFactors:
    """Gathers A and G while attached (or entered, as a context manager), leaves the model as it was.

    The loss is taken to be a mean over the B samples: a sample's gradient is B times what backward gives.
    Positions share the weights; A is averaged over them and G summed (the "expand" setting of
    arXiv 2311.00636).  Evaluation passes (``torch.no_grad``) are not gathered, nor what a loss function
    differentiates inside if the factors are attached unarmed.  What a pass gave waits until
    :meth:`commit`, so that a step that is skipped leaves no trace.
    """

    def __init__(self, model: nn.Module, *, decay: float = 0.95, max_bytes: int = 64 << 20) -> None:
        """Find the layers.

        Args:
            model: Its ``Linear`` and ungrouped ``Conv2d`` layers are followed.
            decay: Of the exponential means.
            max_bytes: Of all factors; the largest are kept as diagonals until the rest fits.
        """
        self.decay = decay
        self.layers: dict[str, Layer] = {
            name: m
            for name, m in model.named_modules()
            if isinstance(m, nn.Linear)
            or (isinstance(m, nn.Conv2d) and m.groups == 1 and not isinstance(m.padding, str))
        }
        self._diagonal = diagonal_factors({n: factor_sizes(m) for n, m in self.layers.items()}, max_bytes)
        self.A: dict[str, Tensor] = {}
        self.G: dict[str, Tensor] = {}
        self._handles: list[RemovableHandle] = []
        self._pending: list[tuple[str, Tensor, Tensor]] = []
        self._error: Exception | None = None  # the first that a hook raised since the last commit
        self._armed = False
        self._scale: Tensor | None = None

    def attach(self, *, armed: bool = True) -> None:
        """Install the hooks; unarmed they note inputs but gather nothing before :meth:`arm`."""
        self._armed, self._scale = armed, None
        for name, layer in self.layers.items():
            self._handles.append(layer.register_forward_hook(self._forward_hook(name, layer)))

    def arm(self, scale: Tensor | None = None) -> None:
        """The backward pass of the loss comes next, ``scale`` times too large (a gradient scaler's)."""
        self._armed, self._scale = True, scale

    def detach(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._armed = False

    def commit(self) -> None:
        """The pass counts: let it enter the means.

        Raises:
            Exception: what was raised in a hook; nothing has entered then.
        """
        pending, error = self._pending, self._error
        self.discard()
        if error is not None:
            raise error
        A, G = dict(self.A), dict(self.G)
        for name, new_A, new_G in pending:
            self._average(A, name, new_A)
            self._average(G, name, new_G)
        self.A, self.G = A, G

    def discard(self) -> None:
        """The pass does not count."""
        self._pending, self._error = [], None

    def __enter__(self) -> Self:
        """Attach the hooks."""
        self.attach()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove the hooks, also when training raised; then nothing is kept."""
        self.detach()
        if kind is None:
            self.commit()
        else:
            self.discard()

    def _forward_hook(self, name: str, layer: Layer) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if not (torch.is_grad_enabled() and output.requires_grad):
                return
            num_samples = inputs[0].shape[0] if inputs[0].dim() > 1 else 1
            try:
                rows = layer_inputs(layer, inputs[0].detach())
            except Exception as error:  # this is called within the user's own forward
                self._error = self._error or error
                return
            # only now, as the gradient arrives: a forward pass that is thrown away leaves no trace
            output.register_hook(lambda gradient: self._gather(name, layer, rows, gradient, num_samples))

        return hook

    @torch.no_grad()
    def _gather(self, name: str, layer: Layer, rows: Tensor, gradient: Tensor, num_samples: int) -> None:
        if not self._armed or self._error is not None:
            return
        try:
            self._pending.append((name, *self._moments(name, layer, rows, gradient, num_samples)))
        except Exception as error:  # this is called within the user's own backward
            self._error = error

    def _moments(
        self, name: str, layer: Layer, rows: Tensor, gradient: Tensor, num_samples: int
    ) -> tuple[Tensor, Tensor]:
        """A and G of one layer in one pass."""
        outputs = output_gradients(layer, gradient.detach()).float() * num_samples
        if self._scale is not None:
            outputs = outputs / self._scale.to(outputs.device)
        A = second_moment(rows, len(rows), diagonal=(name, "A") in self._diagonal)
        G = second_moment(outputs, num_samples, diagonal=(name, "G") in self._diagonal)
        return A, G

    def _average(self, factors: dict[str, Tensor], name: str, new: Tensor) -> None:
        old = factors.get(name)
        # an accelerator learns of an overflow late; decided there, without waiting for it
        finite = torch.isfinite(new).all()
        if old is None:  # the first one is taken as it is: no bias towards zero
            factors[name] = torch.where(finite, new, torch.zeros_like(new))
        else:
            factors[name] = torch.where(finite, old.lerp(new, 1 - self.decay), old)

    def traces(self) -> dict[str, tuple[float, float]]:
        """(trace of A, trace of G) per layer: what the encoder can use."""
        return {name: (_trace(self.A[name]), _trace(self.G[name])) for name in self.A}

    @torch.no_grad()
    def spectra(self) -> dict[str, Tensor]:
        """(4,) float64 per layer: traces of A and G, and how many eigenvalues share them; one wait for the device."""
        if not self.A:
            return {}
        found = weights.on_host([torch.stack([*moments(self.A[name]), *moments(self.G[name])]) for name in self.A])
        return dict(zip(self.A, found, strict=True))

    @torch.no_grad()
    def precondition(self, name: str, gradient: Tensor, damping: float = 1e-3) -> Tensor:
        """(G + pi d)^-1 gradient (A + d / pi)^-1 with factored Tikhonov damping (arXiv 1503.05671, section 6.3).

        Args:
            name: Of the layer.
            gradient: (O, I) of the weight, flattened to a matrix, with the bias as last column if there is one.
            damping: d^2 is added to the curvature.
        """
        A, G = self.A[name], self.G[name]
        mean_A, mean_G = _trace(A) / A.shape[0], _trace(G) / G.shape[0]
        pi = (max(mean_A, 1e-30) / max(mean_G, 1e-30)) ** 0.5
        root = damping**0.5
        left = _solve(G, gradient.float(), root / pi)
        return _solve(A, left.mT, root * pi).mT.contiguous()

    @property
    def forwards_per_step(self) -> float:
        """Cost of one pass's factors in forwards: I^2 and O^2 products per row where the layer itself takes I O."""
        sizes = {name: factor_sizes(layer) for name, layer in self.layers.items()}
        own = sum(pair[0] * pair[1] for pair in sizes.values())
        full = sum(
            size * size for name, pair in sizes.items() for size, kind in zip(pair, "AG", strict=True)
            if (name, kind) not in self._diagonal
        )  # fmt: skip
        return full / own if own else 0.0

    def memory_bytes(self) -> int:
        """Bytes of all factors."""
        return sum(t.numel() * t.element_size() for t in (*self.A.values(), *self.G.values()))

    def state_dict(self) -> StateDict:
        """All factors."""
        return {"A": dict(self.A), "G": dict(self.G)}

    def load_state_dict(self, state: StateDict) -> None:
        """Inverse of :meth:`state_dict`, with copies on the devices of the layers."""
        self.A, self.G = (
            {name: t.to(self.layers[name].weight.device, copy=True) for name, t in state[kind].items()} for kind in "AG"
        )


def moments(factor: Tensor) -> tuple[Tensor, Tensor]:
    """Trace and participation ratio (tr F)^2 / |F|^2 of a factor: between 1 and its rank, without a decomposition."""
    trace = factor.sum() if factor.dim() == 1 else factor.diagonal().sum()
    square = factor.square().sum()
    return trace, torch.where(square > 0, trace.square() / square.clamp(min=1e-30), torch.zeros_like(square))


def _trace(factor: Tensor) -> float:
    return float(factor.sum() if factor.dim() == 1 else factor.diagonal().sum())


def _solve(factor: Tensor, right: Tensor, damping: float) -> Tensor:
    if factor.dim() == 1:
        return right / (factor + damping)[:, None]
    eye = torch.eye(len(factor), dtype=factor.dtype, device=factor.device)
    solution: Tensor = torch.linalg.solve(factor + damping * eye, right)
    return solution
