"""Where parameters enter an autograd graph, and which residual each row there belongs to.

A parameter W meets the data in few kinds of nodes: a product of rows z with a view of W (a linear layer, whatever way
it is written), a sum or a product element by element (biases, gains), a lookup (embeddings).  In each of them the
gradient of residual r with respect to W is made of the rows that lead to r: outer products of z with the gradient that
arrives at the node.  One forward and one backward therefore give every residual's own gradient (Goodfellow, arXiv
1510.01799), as long as no row leads to two residuals.

Which row leads to which residual is found out and not assumed: the residuals get numbers, and for each binary digit one
backward passes only those with a 1 there; a row whose gradient neither vanishes nor stays as it was leads to several.

Nodes are read by the names that torch gives them; whatever is not known here is :class:`NotSeparableError`, and the
caller takes the long way round.

Letters: ``R`` residuals, ``M`` rows at a node.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

#: Nodes that only show the elements of a tensor in another order, or some of them.
VIEWS = frozenset({
    "TBackward0", "TransposeBackward0", "PermuteBackward0", "SelectBackward0", "SliceBackward0", "ViewBackward0",
    "UnsafeViewBackward0", "ReshapeAliasBackward0", "UnsqueezeBackward0", "SqueezeBackward0", "SqueezeBackward1",
    "AliasBackward0", "DetachBackward0",
})  # fmt: skip
#: Relative difference under which a gradient counts as unchanged.
SAME = 1e-3

Kind = Literal["outer", "elementwise", "lookup"]


class NotSeparableError(Exception):
    """The gradient of one residual cannot be read off a single backward; the message says why."""


@dataclass(frozen=True, slots=True)
class Use:
    """A place where a parameter enters the graph.

    Attributes:
        kind: How it meets the data.
        edge: Gradients with respect to the node's output.
        place: Of the parameter.
        index: Elements of the flattened parameter, in the order of the view that the node sees.
        view: Shape of that view, as the output's shape is to be broadcast from it.
        data: (M, i) rows of an outer product; factors of an elementwise one (None: 1); indices of a lookup.
        layout: How the gradient's rows lie: as rows, as columns, or as the pixels of (N, C, H, W).
        factor: Of an elementwise sum.
    """

    kind: Kind
    edge: GradientEdge
    place: int
    index: Tensor
    view: tuple[int, ...]
    data: Tensor | None = None
    layout: Literal["rows", "columns", "pixels"] = "rows"
    factor: float = 1.0


def nodes_of(root: Tensor) -> list[Any]:
    """Nodes of a graph in a fixed order."""
    seen: set[Any] = set()
    order: list[Any] = []
    stack: list[Any] = [root.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        order.append(node)
        stack.extend(child for child, _ in reversed(node.next_functions))
    return order


def signature(root: Tensor, nodes: Sequence[Any]) -> tuple[Any, ...]:
    """What two graphs have in common whose rows lead to the same residuals."""
    return (tuple(root.shape), tuple(node.name() for node in nodes))


@dataclass(frozen=True, slots=True)
class Entry:
    """Where in a graph of known signature a parameter enters.

    Attributes:
        number: Of the node.
        position: Among the node's inputs.
        index: See :class:`Use`.
    """

    number: int
    position: int
    index: Tensor


def uses_again(nodes: Sequence[Any], parameters: Sequence[Tensor], entries: Sequence[Entry]) -> list[Use]:
    """The same as :func:`uses_of` for another graph with the same signature.

    Args:
        nodes: Of the graph.
        parameters: Leaves.
        entries: Of the graph that was looked through.

    Raises:
        NotSeparableError: a parameter is not where it was.
    """
    places = {id(p): i for i, p in enumerate(parameters)}
    found = []
    for entry in entries:
        node = nodes[entry.number]
        leaf = _leaf(node.next_functions[entry.position][0])
        if leaf is None or id(leaf[0]) not in places:
            raise NotSeparableError("a parameter is not where it was")
        found.append(_use(node, entry.position, places[id(leaf[0])], _View(*leaf, entry.index)))
    return found


def uses_of(nodes: Sequence[Any], parameters: Sequence[Tensor]) -> tuple[list[Use], list[Entry]]:
    """Every place where one of the parameters enters a graph.

    Args:
        nodes: Of the graph.
        parameters: Leaves.

    Raises:
        NotSeparableError: one of them is a kind that is not known here.
    """
    places = {id(p): i for i, p in enumerate(parameters)}
    found: list[Use] = []
    entries: list[Entry] = []
    for number, node in enumerate(nodes):
        if node.name() in VIEWS:
            continue
        for position, (child, _) in enumerate(node.next_functions):
            entry = _leaf(child)
            if entry is None or id(entry[0]) not in places:
                continue
            found.append(_use(node, position, places[id(entry[0])], _View(*entry, None)))
            entries.append(Entry(number, position, found[-1].index))
    return found, entries


def _leaf(node: Any) -> tuple[Tensor, list[Any]] | None:
    """The leaf that a node is a view of, and the views on the way."""
    chain = []
    while node is not None and node.name() in VIEWS:
        chain.append(node)
        node = node.next_functions[0][0]
    if node is None or not hasattr(node, "variable"):
        return None
    return node.variable, chain


@dataclass(frozen=True, slots=True)
class _View:
    """A parameter as a node sees it.

    Attributes:
        parameter: The leaf.
        chain: Views, from the node to the leaf.
        known: Index, where it was found out before.
    """

    parameter: Tensor
    chain: list[Any]
    known: Tensor | None

    def index(self, shape: Sequence[int]) -> Tensor:
        """Elements of the flattened parameter that the view shows, in the view's order.

        Raises:
            NotSeparableError: it cannot be followed.
        """
        if self.known is not None:
            return self.known
        count, device = math.prod(shape), self.parameter.device
        numbers = torch.arange(1, count + 1, dtype=torch.float64, device=device).view(tuple(shape))
        for node in self.chain:
            numbers = node(numbers)
        flat = numbers.reshape(-1).long()
        where = flat.nonzero()[:, 0]
        if flat.numel() != self.parameter.numel() or len(where) != count:
            raise NotSeparableError("a view of a parameter cannot be followed")
        index = torch.empty(count, dtype=torch.long, device=device)
        index[flat[where] - 1] = where
        return index

    def shape(self) -> tuple[int, ...]:
        """Where no node tells it: that of the parameter itself, or of what was selected of it.

        Raises:
            NotSeparableError: it cannot be told.
        """
        shape = tuple(self.parameter.shape)
        for node in reversed(self.chain):
            name = node.name()
            if name == "SelectBackward0":
                dim = int(node._saved_dim) % len(shape)
                shape = (*shape[:dim], *shape[dim + 1 :])
            elif name == "UnsqueezeBackward0":
                dim = int(node._saved_dim)
                dim = dim if dim >= 0 else dim + len(shape) + 1
                shape = (*shape[:dim], 1, *shape[dim:])
            elif name == "TBackward0":
                shape = shape[::-1]
            elif name != "AliasBackward0":
                raise NotSeparableError(f"a parameter enters through {name}")
        return shape


def _use(node: Any, position: int, place: int, seen: _View) -> Use:
    """One place.

    Raises:
        NotSeparableError: of a kind that is not known here.
    """
    name, edge = node.name(), GradientEdge(node, 0)

    def outer(shape: Sequence[int], data: Tensor, layout: Any = "rows") -> Use:
        return Use("outer", edge, place, seen.index(shape), tuple(shape), data, layout)

    def elementwise(data: Tensor | None = None, factor: float = 1.0) -> Use:
        shape = seen.shape()
        return Use("elementwise", edge, place, seen.index(shape), shape, data, factor=factor)

    if name == "MmBackward0":
        if position == 1:
            return outer(node._saved_mat2_sym_sizes, node._saved_self)
        return outer(node._saved_self_sym_sizes, node._saved_mat2.T, "columns")
    if name == "AddmmBackward0" and node._saved_alpha == 1 and node._saved_beta == 1:
        if position == 0:
            return elementwise()
        if position == 2:
            return outer(node._saved_mat2_sym_sizes, node._saved_mat1)
        return outer(node._saved_mat1_sym_sizes, node._saved_mat2.T, "columns")
    if name == "MvBackward0" and position == 1:
        rows = node._saved_self
        return Use("outer", edge, place, seen.index((rows.shape[1],)), (rows.shape[1], 1), rows)
    if name in ("AddBackward0", "SubBackward0"):
        sign = 1.0 if position == 0 else float(node._saved_alpha) * (1.0 if name == "AddBackward0" else -1.0)
        return elementwise(factor=sign)
    if name == "MulBackward0":
        other = node._saved_other if position == 0 else node._saved_self
        if isinstance(other, Tensor):
            return elementwise(other)
    if name == "NativeLayerNormBackward0" and position:
        return elementwise(_normalized(node) if position == 1 else None)
    if name == "ConvolutionBackward0" and position and not node._saved_transposed and node._saved_groups == 1:
        return _convolution(node, position, place, seen)
    if name == "EmbeddingBackward0" and not seen.chain and not node._saved_scale_grad_by_freq:
        shape = tuple(seen.parameter.shape)
        return Use("lookup", edge, place, seen.index(shape), shape, node._saved_indices)
    raise NotSeparableError(f"a parameter enters through {name}")


def _normalized(node: Any) -> Tensor:
    """What a layer norm multiplies by its gains."""
    normalized: Tensor = (node._saved_input - node._saved_result1) * node._saved_result2
    return normalized


def _convolution(node: Any, position: int, place: int, seen: _View) -> Use:
    """A convolution in two dimensions is a matrix product with the patches of its input.

    Raises:
        NotSeparableError: it has another number of dimensions.
    """
    edge, shape = GradientEdge(node, 0), tuple(seen.parameter.shape)
    if position == 2:
        return Use("elementwise", edge, place, seen.index(shape), (shape[0], 1, 1))
    if len(shape) != 4 or seen.chain:
        raise NotSeparableError(f"a parameter enters through {node.name()} in {len(shape) - 2} dimensions")
    patches = torch.nn.functional.unfold(
        node._saved_input, shape[2:], dilation=node._saved_dilation, padding=node._saved_padding,
        stride=node._saved_stride,
    )  # fmt: skip
    rows = patches.transpose(1, 2).reshape(-1, patches.shape[1])
    width = math.prod(shape[1:])
    index = seen.known if seen.known is not None else seen.index(shape).view(shape[0], width).T.reshape(-1)
    return Use("outer", edge, place, index, (width, shape[0]), rows, "pixels")


def gradients_at(root: Tensor, edges: Sequence[GradientEdge], cotangent: Tensor) -> list[Tensor | None]:
    """Gradients of ``cotangent . root`` at every edge; the graph is kept."""
    return list(torch.autograd.grad(root, list(edges), cotangent, retain_graph=True, allow_unused=True))


def rows_of(use: Use, gradient: Tensor) -> Tensor:
    """(M, q) a gradient that arrived at a node, by the rows that lead to residuals."""
    if use.kind == "outer":
        if gradient.dim() == 1:  # a matrix times a vector
            return gradient[:, None]
        if use.layout == "pixels":
            return gradient.movedim(1, -1).reshape(-1, gradient.shape[1])
        return gradient.T if use.layout == "columns" else gradient
    if use.kind == "lookup":
        return gradient.reshape(-1, gradient.shape[-1])
    return gradient.reshape(-1, 1)


def residual_of_rows(root: Tensor, uses: Sequence[Use]) -> list[Tensor]:
    """(M,) per use: the residual that each row leads to, -1 where the gradient vanishes.

    Args:
        root: (R,) or (R, C) residuals; those of one row count as one.
        uses: Of its graph.

    Raises:
        NotSeparableError: a row leads to several.
    """
    count = len(root)
    edges = [use.edge for use in uses]
    # numbers whose products with gradients hardly ever cancel
    columns = 1 if root.dim() == 1 else root[0].numel()
    pattern = torch.cos(torch.arange(columns, device=root.device, dtype=root.dtype)) + 2
    pattern = pattern.view((1, *root.shape[1:])).expand_as(root)
    full = [None if g is None else rows_of(u, g) for u, g in zip(uses, gradients_at(root, edges, pattern), strict=True)]
    scale = [None if g is None else g.abs().amax(dim=1) for g in full]
    found = [torch.zeros(0 if g is None else len(g), dtype=torch.long, device=root.device) for g in full]
    numbers = torch.arange(count, device=root.device)
    for bit in range(max(count - 1, 0).bit_length()):
        mask = (numbers >> bit & 1).to(root.dtype).view((count, *(1,) * (root.dim() - 1)))
        for k, (use, g) in enumerate(zip(uses, gradients_at(root, edges, pattern * mask), strict=True)):
            whole, size = full[k], scale[k]
            if whole is None or size is None:
                continue
            part = torch.zeros_like(whole) if g is None else rows_of(use, g)
            there, gone = (part - whole).abs().amax(dim=1), part.abs().amax(dim=1)
            one, none = there <= SAME * size, gone <= SAME * size
            if not bool((one | none).all()):
                raise NotSeparableError("samples depend on one another")
            found[k] |= (one & ~none).long() << bit
    return [
        torch.where(s > 0, f, -torch.ones_like(f)) if s is not None else f for f, s in zip(found, scale, strict=True)
    ]
