"""Kronecker factors of the curvature of linear and convolutional layers (K-FAC, arXiv 1503.05671).

For a layer s = W a the Fisher matrix of W is about A x G (Kronecker), with

    A = E[a a']   of its inputs        G = E[g g']   of the gradients at its outputs,

kept as exponential means, gathered by hooks during training's own passes.  A convolution is a linear
layer on patches, summed over positions (KFC, arXiv 1602.01407).  A factor beyond the memory limit is
kept as its diagonal.

Letters: ``B`` samples, ``T`` positions (tokens, pixels), ``I`` inputs (one more with a bias), ``O`` outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle

from .records import State

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


class KfacFactors:
    """Context manager: gathers A and G while it is entered, leaves the model as it was.

    The loss is taken to be a mean over the B samples: a sample's gradient is B times what backward gives.
    Positions share the weights; A is averaged over them and G summed (the "expand" setting of
    arXiv 2311.00636).  Evaluation passes (``torch.no_grad``) are not gathered.
    """

    def __init__(self, model: nn.Module, *, decay: float = 0.95, max_bytes: int = 64 << 20) -> None:
        """Find the layers.

        Args:
            model: Its ``Linear`` and ungrouped ``Conv2d`` layers are followed.
            decay: Of the exponential means.
            max_bytes: Largest full factor; beyond it the diagonal is kept.
        """
        self.decay, self.max_bytes = decay, max_bytes
        self.layers: dict[str, Layer] = {
            name: m
            for name, m in model.named_modules()
            if isinstance(m, nn.Linear)
            or (isinstance(m, nn.Conv2d) and m.groups == 1 and not isinstance(m.padding, str))
        }
        self.A: dict[str, Tensor] = {}
        self.G: dict[str, Tensor] = {}
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> Self:
        """Attach the hooks."""
        for name, layer in self.layers.items():
            self._handles.append(layer.register_forward_hook(self._forward_hook(name, layer)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove the hooks, also when training raised."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _forward_hook(self, name: str, layer: Layer) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if not (torch.is_grad_enabled() and output.requires_grad):
                return
            num_samples = inputs[0].shape[0] if inputs[0].dim() > 1 else 1
            rows = layer_inputs(layer, inputs[0].detach())
            # only now, as the gradient arrives: a forward pass that is thrown away leaves no trace
            output.register_hook(lambda gradient: self._gather(name, layer, rows, gradient, num_samples))

        return hook

    @torch.no_grad()
    def _gather(self, name: str, layer: Layer, rows: Tensor, gradient: Tensor, num_samples: int) -> None:
        outputs = output_gradients(layer, gradient.detach()) * num_samples
        self._average(self.A, name, second_moment(rows, len(rows), diagonal=self._too_large(rows.shape[1])))
        self._average(self.G, name, second_moment(outputs, num_samples, diagonal=self._too_large(outputs.shape[1])))

    def _too_large(self, size: int) -> bool:
        return 4 * size * size > self.max_bytes

    def _average(self, factors: dict[str, Tensor], name: str, new: Tensor) -> None:
        old = factors.get(name)
        # the first one is taken as it is: no bias towards zero
        factors[name] = new if old is None else old.lerp_(new, 1 - self.decay)

    def traces(self) -> dict[str, tuple[float, float]]:
        """(trace of A, trace of G) per layer: what the encoder can use."""
        return {name: (_trace(self.A[name]), _trace(self.G[name])) for name in self.A}

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

    def memory_bytes(self) -> int:
        """Bytes of all factors."""
        return sum(t.numel() * t.element_size() for t in (*self.A.values(), *self.G.values()))

    def state_dict(self) -> State:
        """All factors."""
        return {"A": dict(self.A), "G": dict(self.G)}

    def load_state_dict(self, state: State) -> None:
        """Inverse of :meth:`state_dict`."""
        self.A = {name: t.clone() for name, t in state["A"].items()}
        self.G = {name: t.clone() for name, t in state["G"].items()}


def _trace(factor: Tensor) -> float:
    return float(factor.sum() if factor.dim() == 1 else factor.diagonal().sum())


def _solve(factor: Tensor, right: Tensor, damping: float) -> Tensor:
    if factor.dim() == 1:
        return right / (factor + damping)[:, None]
    eye = torch.eye(len(factor), dtype=factor.dtype, device=factor.device)
    solution: Tensor = torch.linalg.solve(factor + damping * eye, right)
    return solution
