"""Parameters that cannot be calculated with, seen as plain real ones: complex ones, and wrappers around one tensor.

Complex ones, as spectral layers have them, are seen as real ones of twice the numbers.  Inner products, means and jumps
of complex weights are those of their real and imaginary parts, so everything that works on lists of real tensors works
on these views.  A view shares its storage with the parameter: what is written to
one is written to both.  Gradient and ``requires_grad`` are the parameter's own.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


class ParameterView(Tensor):
    """A plain view of a parameter that itself cannot be calculated with; operations on it give plain tensors.

    Attributes:
        base: The parameter.
    """

    base: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def _seen(self, tensor: Tensor) -> Tensor:
        """How the parameter, or its gradient, is seen; shares its memory."""
        raise NotImplementedError

    @property
    def grad(self) -> Tensor | None:  # type: ignore[override]
        """The parameter's gradient, seen in the same way."""
        grad = self.base.grad
        return None if grad is None else self._seen(grad.detach())

    @property
    def requires_grad(self) -> bool:  # type: ignore[override]
        """Whether the parameter trains."""
        return self.base.requires_grad

    def follow(self) -> None:
        """Look at the parameter's storage where that was replaced (``parameter.data = ...``)."""
        now = self._seen(self.base.detach())
        if self.data_ptr() != now.data_ptr():
            self.data = now

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        """A plain tensor of its own."""
        return self.detach().clone()

    def __reduce_ex__(self, protocol: Any) -> Any:
        """As a plain tensor: a view cannot be kept without its parameter."""
        return self.detach().clone().__reduce_ex__(protocol)


class RealView(ParameterView):
    """(..., 2) real view of a complex parameter."""

    @staticmethod
    def of(parameter: Tensor) -> RealView:
        """The view of ``parameter``."""
        view: RealView = torch.view_as_real(parameter.detach()).as_subclass(RealView)
        view.base = parameter
        return view

    def _seen(self, tensor: Tensor) -> Tensor:
        return torch.view_as_real(tensor.resolve_conj())


class InnerView(ParameterView):
    """The plain tensor inside of a parameter that is a wrapper around it, as weights of torchao's BitNet layers are."""

    @staticmethod
    def of(parameter: Tensor) -> InnerView:
        """The view of ``parameter``, for which :func:`wraps_one` holds."""
        view: InnerView = inner(parameter).detach().as_subclass(InnerView)
        view.base = parameter
        return view

    def _seen(self, tensor: Tensor) -> Tensor:
        return inner(tensor).detach()


def wraps_one(tensor: Tensor) -> bool:
    """Whether a tensor is a subclass whose numbers are those of one plain tensor inside of it."""
    return inner(tensor) is not tensor


def inner(tensor: Tensor) -> Tensor:
    """The plain tensor whose numbers a wrapper shows, which shares its memory; any other tensor itself.

    A wrapper shows the numbers of what is inside if that is all that it is made of, in the same type and shape; what is
    made of codes and scales is none.
    """
    if type(tensor) in (Tensor, nn.Parameter) or not hasattr(tensor, "__tensor_flatten__"):
        return tensor
    names, _ = tensor.__tensor_flatten__()
    if len(names) != 1:
        return tensor
    found: Tensor = getattr(tensor, names[0])
    alike = type(found) is Tensor and (found.shape, found.dtype) == (tensor.shape, tensor.dtype)
    return found if alike else tensor


def all_differentiable(parameters: Iterable[Tensor]) -> bool:
    """Whether whoever differentiates by the parameters in ways of their own can: by complex ones and wrappers not."""
    return not any(isinstance(p, RealView | InnerView) for p in parameters)


def owner(tensor: Tensor) -> Tensor:
    """The parameter that a predicted tensor belongs to: itself, or the one that it is a view of."""
    return tensor.base if isinstance(tensor, ParameterView) else tensor


def follow(tensors: Iterable[Tensor]) -> None:
    """:meth:`ParameterView.follow` for all views among ``tensors``."""
    for tensor in tensors:
        if isinstance(tensor, ParameterView):
            tensor.follow()
