"""The Jacobian of residuals with respect to the weights, in pieces that are never larger than need be.

Where every residual's gradient can be read off one backward (:mod:`.graph`), a layer's part of the Jacobian is a sum of
few outer products per residual, and stays one: products with vectors and the kernel A A' are made of the factors (for
one product per residual, (D D') * (Z Z') element by element).  Elsewhere the rows are computed one by one, some at a
time.

Letters: ``R`` rows (residuals, times what their loss is folded with), ``P`` weights, ``c`` outer products per row.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ...numerics.closed_form import gram, outer_gram, outer_gram_pays, outer_gram_products, written_gram_products
from ...weights import algebra as weights
from . import price
from .graph import (
    Entry,
    NotSeparableError,
    Use,
    gradients_at,
    nodes_of,
    residual_of_rows,
    rows_of,
    signature,
    uses_again,
    uses_of,
)

#: Up to so many columns an outer product is written out.
WRITTEN_OUT = 64
#: Rows that the weight form writes out at a time.
ROWS_AT_A_TIME = 2048
#: Largest relative difference between two ways to compute the same product that passes for rounding.
AGREES, AGREES_SINGLE = 1e-8, 1e-3


class Block(Protocol):
    """Columns of the Jacobian."""

    def jvp(self, d: Tensor) -> Tensor:
        """(R,) of d (P,)."""

    def vjp_into(self, out: Tensor, u: Tensor) -> None:
        """Add A'u to out (P,)."""

    def gram(self) -> Tensor:
        """(R, R) of these columns."""

    def dense_into(self, out: Tensor) -> None:
        """Add the columns to out (R, P)."""

    def some(self, rows: slice) -> Block:
        """These rows of it."""

    def weighted(self, rows: Tensor, factors: Tensor) -> Block:
        """Rows (n,) of it, each times its factor (n,)."""

    def row_squares(self) -> Tensor:
        """(R,) squared norms of its rows."""

    def squared_norm(self) -> float:
        """Sum of the squares of all entries."""

    @property
    def num_products(self) -> int:
        """Multiplications of a product with a vector."""

    @property
    def num_units(self) -> int:
        """Outputs of a layer that the columns tell of."""

    @property
    def num_gram_products(self) -> float:
        """Multiplications of :meth:`gram`, half of a product of a matrix with its own transpose."""


@dataclass(frozen=True, slots=True)
class Dense:
    """Columns written out.

    Attributes:
        rows: (R, q).
        index: (q,) places among the weights, none twice.
    """

    rows: Tensor
    index: Tensor

    def jvp(self, d: Tensor) -> Tensor:
        """See :class:`Block`."""
        return self.rows @ d[self.index]

    def vjp_into(self, out: Tensor, u: Tensor) -> None:
        """See :class:`Block`."""
        out.index_add_(0, self.index, u @ self.rows)

    def gram(self) -> Tensor:
        """See :class:`Block`."""
        return gram(self.rows)

    def dense_into(self, out: Tensor) -> None:
        """See :class:`Block`."""
        out.index_add_(1, self.index, self.rows)

    def some(self, rows: slice) -> Block:
        """See :class:`Block`."""
        return Dense(self.rows[rows], self.index)

    def weighted(self, rows: Tensor, factors: Tensor) -> Block:
        """See :class:`Block`."""
        return Dense(self.rows[rows] * factors[:, None], self.index)

    def row_squares(self) -> Tensor:
        """See :class:`Block`."""
        return self.rows.square().sum(1)

    def squared_norm(self) -> float:
        """See :class:`Block`."""
        return float(self.row_squares().sum())

    @property
    def num_products(self) -> int:
        """See :class:`Block`."""
        return self.rows.numel()

    @property
    def num_gram_products(self) -> float:
        """See :class:`Block`."""
        return len(self.rows) * self.rows.numel() / 2

    @property
    def num_units(self) -> int:
        """See :class:`Block`."""
        return 0


@dataclass(frozen=True, slots=True)
class Outer:
    """Columns that are sums of c outer products per row: row r is sum_k left[r, k] x right[r, k].

    Attributes:
        left: (R, c, a).
        right: (R, c, b).
        index: (a * b,) places among the weights, none twice.
    """

    left: Tensor
    right: Tensor
    index: Tensor

    def jvp(self, d: Tensor) -> Tensor:
        """See :class:`Block`."""
        W = d[self.index].view(self.left.shape[2], self.right.shape[2])
        return ((self.left.flatten(0, 1) @ W) * self.right.flatten(0, 1)).sum(1).view(self.left.shape[:2]).sum(1)

    def vjp_into(self, out: Tensor, u: Tensor) -> None:
        """See :class:`Block`."""
        weighted = (self.left * u[:, None, None]).flatten(0, 1)
        out.index_add_(0, self.index, (weighted.T @ self.right.flatten(0, 1)).reshape(-1))

    def gram(self) -> Tensor:
        """See :class:`Block`."""
        return outer_gram(self.left, self.right) if outer_gram_pays(*self._sizes) else gram(self.written_out())

    def written_out(self) -> Tensor:
        """(R, a * b)."""
        if self.left.shape[1] == 1:
            return (self.left[:, 0, :, None] * self.right[:, 0, None, :]).flatten(1)
        return torch.bmm(self.left.transpose(1, 2), self.right).flatten(1)

    def dense_into(self, out: Tensor) -> None:
        """See :class:`Block`."""
        out.index_add_(1, self.index, self.written_out())

    def some(self, rows: slice) -> Block:
        """See :class:`Block`."""
        return Outer(self.left[rows], self.right[rows], self.index)

    def weighted(self, rows: Tensor, factors: Tensor) -> Block:
        """See :class:`Block`."""
        return Outer(self.left[rows] * factors[:, None, None], self.right[rows], self.index)

    def row_squares(self) -> Tensor:
        """See :class:`Block`."""
        inner = torch.bmm(self.left, self.left.transpose(1, 2)) * torch.bmm(self.right, self.right.transpose(1, 2))
        return inner.sum((1, 2))

    def squared_norm(self) -> float:
        """See :class:`Block`."""
        return float(self.row_squares().sum())

    @property
    def num_products(self) -> int:
        """See :class:`Block`."""
        rows, c, a = self.left.shape
        return rows * c * a * self.right.shape[2]

    @property
    def num_gram_products(self) -> float:
        """See :class:`Block`."""
        return min(outer_gram_products(*self._sizes), written_gram_products(*self._sizes))

    @property
    def num_units(self) -> int:
        """See :class:`Block`; a weight is (outputs, inputs) or the other way round."""
        rows, c, a, b = self._sizes
        return rows * c * max(a, b)

    @property
    def _sizes(self) -> tuple[int, int, int, int]:
        """R, c, a, b."""
        return *self.left.shape, self.right.shape[2]


class Jacobian:
    """A (R, P) as a sum of blocks over disjoint or common columns.

    Attributes:
        num_rows, num_weights: R and P.
        double: The model is in float64.
    """

    def __init__(
        self, blocks: Sequence[Block], num_rows: int, num_weights: int, like: Tensor, *, double: bool = False
    ) -> None:
        """Bind.

        Args:
            blocks: No weight belongs to two of them.
            num_rows: R.
            num_weights: P.
            like: Of the type and on the device of all products.
            double: See the attribute.
        """
        self.double = double
        self.blocks, self.num_rows, self.num_weights = list(blocks), num_rows, num_weights
        self._like = like

    def jvp(self, d: Tensor) -> Tensor:
        """A d, (R,)."""
        out = self._like.new_zeros(self.num_rows)
        for block in self.blocks:
            out += block.jvp(d)
        return out

    def vjp(self, u: Tensor) -> Tensor:
        """A'u, (P,)."""
        out = self._like.new_zeros(self.num_weights)
        for block in self.blocks:
            block.vjp_into(out, u)
        return out

    def gram(self) -> Tensor:
        """A A', (R, R)."""
        out = self._like.new_zeros(self.num_rows, self.num_rows)
        for block in self.blocks:
            out += block.gram()
        return out

    def squared_norm(self) -> float:
        """Sum of the squares of all entries."""
        return sum(block.squared_norm() for block in self.blocks)

    def row_squares(self) -> Tensor:
        """(R,) squared norms of its rows."""
        out = self._like.new_zeros(self.num_rows)
        for block in self.blocks:
            out += block.row_squares()
        return out

    def weighted(self, rows: Tensor, factors: Tensor) -> Jacobian:
        """Rows (n,) of it, each times its factor (n,)."""
        blocks = [block.weighted(rows, factors) for block in self.blocks]
        return Jacobian(blocks, len(rows), self.num_weights, self._like, double=self.double)

    @property
    def num_products(self) -> float:
        """Multiplications of a product with a vector."""
        return float(sum(block.num_products for block in self.blocks))

    @property
    def counts(self) -> price.Counts:
        """What its matrices take."""
        of_gram = sum(block.num_gram_products for block in self.blocks)
        written = float(self.num_rows) * self.num_weights
        of_normal = written * self.num_weights / 2 + self.num_products
        units = sum(block.num_units for block in self.blocks)
        return price.Counts(
            self.num_rows, self.num_weights, self.num_products, of_gram, of_normal, units, double=self.double
        )

    def dense(self) -> Tensor:
        """A written out, (R, P)."""
        out = self._like.new_zeros(self.num_rows, self.num_weights)
        for block in self.blocks:
            block.dense_into(out)
        return out

    def normal(self) -> Tensor:
        """A'A, (P, P); some rows at a time."""
        out = self._like.new_zeros(self.num_weights, self.num_weights)
        for start in range(0, self.num_rows, ROWS_AT_A_TIME):
            rows = slice(start, min(start + ROWS_AT_A_TIME, self.num_rows))
            written = self._like.new_zeros(rows.stop - start, self.num_weights)
            for block in self.blocks:
                block.some(rows).dense_into(written)
            out += gram(written.T)
        return out


@dataclass(frozen=True, slots=True)
class _Layout:
    """Which rows at a node lead to which residual, in an order that groups them.

    Attributes:
        order: (N, c) rows by residual; M where there is none.
        unknown: Rows whose gradient has always vanished so far.
    """

    order: Tensor
    unknown: Tensor


def completed(residual: Tensor, count: int) -> Tensor:
    """Which residual rows lead to, where that of some is unknown and those that are known lie in a regular order.

    A unit that is cut off (ReLU) has no gradient, and so its row shows nothing.  Rows of nearly all models lie sample
    by sample or unit by unit; where all that are known do, so do the others.  What is made of them is compared with a
    backward of its own once a proposal.

    Args:
        residual: (M,) numbers, -1 where unknown.
        count: Residuals.

    Returns:
        (M,) the same, completed where that is possible.
    """
    rows, known = len(residual), (residual >= 0).nonzero()[:, 0]
    if len(known) == rows or len(known) < 2:
        return residual
    place = torch.arange(rows, device=residual.device)
    first, last = int(known[0]), int(known[-1])
    low, gap = int(residual[first]), int(residual[last] - residual[first])
    guesses = []
    if gap > 0:  # sample by sample, k rows each, beginning anywhere
        most = rows if gap == 1 else (last - first) // (gap - 1) + 1
        sizes = [k for k in range(max((last - first) // (gap + 1), 1), most + 1) if rows % k == 0]
        guesses = [low - first // k + place // k for k in sizes]
    if rows % count == 0:  # unit by unit
        guesses.append(place % count)
    fitting = [
        g for g in guesses if int(g[0]) >= 0 and int(g[-1]) < count and torch.equal(g[known], residual[known])
    ]  # fmt: skip
    alike = all(torch.equal(g, fitting[0]) for g in fitting[1:])
    return fitting[0] if fitting and alike else residual


def _layout_of(residual: Tensor, count: int) -> _Layout:
    """Group rows by the residual that they lead to."""
    rows = len(residual)
    unknown = (residual < 0).nonzero()[:, 0]
    known = (residual >= 0).nonzero()[:, 0]
    order = known[torch.argsort(residual[known], stable=True)]
    counts = torch.bincount(residual[known], minlength=count)
    most = max(int(counts.max()), 1) if count else 1
    table = residual.new_full((count, most), rows)
    starts = counts.cumsum(0) - counts
    within = torch.arange(len(order), device=residual.device) - starts.repeat_interleave(counts)
    table[residual[order], within] = order
    return _Layout(table, unknown)


class Linearizer:
    """Makes Jacobians of one kind of residuals; remembers how their rows lie.

    Attributes:
        separable: Whether one backward told every residual's gradient; None: nobody tried yet.
        why_not: Why it did not.
    """

    def __init__(self, parameters: Sequence[Tensor], *, chunk_rows: int, memory_mb: float) -> None:
        """Nothing is known yet.

        Args:
            parameters: Leaves, in the order of the weights.
            chunk_rows: Rows that are differentiated at a time where they cannot be read off.
            memory_mb: For a Jacobian that has to be written out.
        """
        self._parameters, self._chunk, self._memory_mb = list(parameters), chunk_rows, memory_mb
        self._offsets = [0]
        for p in self._parameters:
            self._offsets.append(self._offsets[-1] + p.numel())
        self.separable: bool | None = None
        self.why_not = ""
        self._signature: tuple[Any, ...] | None = None
        self._entries: list[Entry] = []
        self._layouts: list[_Layout] = []
        self._regular = True  # rows of which nothing is known are taken to lie as all others do

    @property
    def num_weights(self) -> int:
        """P."""
        return self._offsets[-1]

    def jacobian(self, outputs: Tensor, cotangents: Sequence[Tensor], *, check: bool) -> Jacobian:
        """Rows for every cotangent and every sample, cotangent by cotangent.

        Args:
            outputs: (N,) or (N, C) with a graph.
            cotangents: Each of the outputs' shape; row (k, n) is the gradient of ``cotangents[k][n] . outputs[n]``.
            check: Compare one product with what a backward of its own says.
        """
        try:
            return self.read_off(outputs, cotangents, check=check)
        except NotSeparableError:
            return self._row_by_row(outputs, cotangents)

    def read_off(self, outputs: Tensor, cotangents: Sequence[Tensor], *, check: bool) -> Jacobian:
        """The same, from one backward per cotangent.

        Raises:
            NotSeparableError: that tells not every residual's gradient.
        """
        while self.separable is not False:
            try:
                found = self._read_off(outputs, cotangents)
                if check:
                    self._check(found, outputs, cotangents)
            except NotSeparableError as error:
                if self._regular:  # rows that were taken to lie as all others do
                    self._regular, self._signature = False, None
                    continue
                self.separable, self.why_not = False, str(error)
            else:
                self.separable = True
                return found
        raise NotSeparableError(self.why_not)

    def num_backward(self, num_cotangents: int, num_rows: int) -> float:
        """Backwards that a Jacobian takes."""
        if self.separable is False:
            return price.rows_one_by_one(num_rows, self.num_weights, self._chunk)
        return float(num_cotangents)

    def counted(self, outputs: Tensor, cotangents: Sequence[Tensor]) -> price.Counts:
        """What a Jacobian and its matrices would take, for at most a backward per cotangent; see :meth:`jacobian`."""
        rows, num_weights = len(cotangents) * len(outputs), float(self.num_weights)
        if self.separable is not False:
            try:
                A = self._read_off(outputs, cotangents)
            except NotSeparableError as error:
                self.separable, self.why_not = False, str(error)
            else:
                return A.counts
        written = rows * num_weights
        return price.Counts(
            rows, self.num_weights, written, written * rows / 2, written * num_weights / 2,
            double=outputs.dtype == torch.float64,
        )  # fmt: skip

    # ---- one backward for all residuals ----------------------------------------------------------------

    def _read_off(self, outputs: Tensor, cotangents: Sequence[Tensor]) -> Jacobian:
        nodes = nodes_of(outputs)
        known = signature(outputs, nodes)
        same = known == self._signature
        if same:
            uses = uses_again(nodes, self._parameters, self._entries)
        else:
            uses, self._entries = uses_of(nodes, self._parameters)
            self._learn(outputs, uses, known)
        edges = [use.edge for use in uses]
        found = [gradients_at(outputs, edges, c) for c in cotangents]
        for k, (use, layout) in enumerate(zip(uses, self._layouts, strict=True)):
            arrived = [g[k] for g in found]
            if len(layout.unknown) and any(
                bool((rows_of(use, g)[layout.unknown] != 0).any()) for g in arrived if g is not None
            ):  # rows that were dead when they were looked at
                self._learn(outputs, uses, known)
                break
        return self._assembled(uses, found, len(outputs), outputs)

    def _learn(self, outputs: Tensor, uses: Sequence[Use], known: tuple[Any, ...]) -> None:
        self._signature = None
        count, found = len(outputs), residual_of_rows(outputs, uses)
        self._layouts = [_layout_of(completed(r, count) if self._regular else r, count) for r in found]
        self._signature = known

    def _assembled(
        self, uses: Sequence[Use], found: Sequence[Sequence[Tensor | None]], count: int, outputs: Tensor
    ) -> Jacobian:
        wide = weights.accumulate_dtype(outputs.device)
        like = outputs.detach().new_zeros((), dtype=wide)
        outers: dict[tuple[int, ...], list[Outer]] = {}
        written: list[tuple[int, Dense]] = []
        for k, (use, layout) in enumerate(zip(uses, self._layouts, strict=True)):
            gradients = [g[k] for g in found]
            if all(g is None for g in gradients):
                continue
            rows = [_grouped(rows_of(use, g), layout, like) for g in gradients if g is not None]
            if len(rows) != len(gradients):
                raise NotSeparableError("a row leads to some of the outputs only")
            D = torch.cat(rows)  # (R, c, q)
            offset = self._offsets[use.place]
            if use.kind == "outer":
                block = _outer(use, layout, D, len(found), offset)
                a, b = block.left.shape[2], block.right.shape[2]
                if a * b <= WRITTEN_OUT:
                    written.append((use.place, Dense(block.written_out(), block.index)))
                else:
                    outers.setdefault((use.place, *block.left.shape[2:], *block.right.shape[2:]), []).append(block)
            else:
                shape = next(tuple(g.shape) for g in gradients if g is not None)
                parts = _Parts(D, len(found), shape)
                size = self._parameters[use.place].numel()
                written.append((use.place, _scattered(use, layout, parts, offset, size)))
        merged = [(key[0], block) for key, group in outers.items() for block in _merged(group)]
        return Jacobian(
            _without_common_columns(merged, written), len(found) * count, self.num_weights, like,
            double=outputs.dtype == torch.float64,
        )  # fmt: skip

    def _check(self, found: Jacobian, outputs: Tensor, cotangents: Sequence[Tensor]) -> None:
        """Compare a product with the rows and a backward of its own.

        Raises:
            NotSeparableError: they differ.
        """
        count = len(outputs)
        u = torch.cos(torch.arange(found.num_rows, device=outputs.device, dtype=torch.float64) * 2.0 + 1.0)
        total = torch.zeros_like(outputs)
        for k, cotangent in enumerate(cotangents):
            part = u[k * count : (k + 1) * count].to(outputs.dtype)
            total = total + cotangent * part.view((count, *(1,) * (outputs.dim() - 1)))
        gradients = torch.autograd.grad(outputs, self._parameters, total, retain_graph=True, allow_unused=True)
        expected = flat(gradients, self._parameters).to(found.vjp(u.to(found._like)).dtype)
        got = found.vjp(u.to(found._like))
        double = all(t.dtype == torch.float64 for t in (outputs, *self._parameters))
        tolerance = AGREES if double else AGREES_SINGLE
        rows_norm = float(expected.norm()) + float(got.norm())
        if not float((expected - got).norm()) <= tolerance * rows_norm + torch.finfo(outputs.dtype).tiny:
            self._signature = None
            raise NotSeparableError("the rows do not add up to the gradient")

    # ---- one backward per row ----------------------------------------------------------------------------

    def _row_by_row(self, outputs: Tensor, cotangents: Sequence[Tensor]) -> Jacobian:
        count, wide = len(outputs), weights.accumulate_dtype(outputs.device)
        like = outputs.detach().new_zeros((), dtype=wide)
        needed = 8 * len(cotangents) * count * self.num_weights / 2**20
        if needed > self._memory_mb:
            raise MemoryError(
                f"the Jacobian of {len(cotangents) * count} residuals and {self.num_weights} weights takes "
                f"{needed:.0f} MB ({self.why_not}): raise predictor.gauss_newton.memory_mb"
            )
        A = outputs.detach().new_zeros(len(cotangents) * count, self.num_weights, dtype=wide)
        for k, cotangent in enumerate(cotangents):
            for start in range(0, count, self._chunk):
                stop = min(start + self._chunk, count)
                seeds = outputs.new_zeros(stop - start, *outputs.shape)
                seeds[torch.arange(stop - start), torch.arange(start, stop)] = cotangent[start:stop].to(outputs.dtype)
                gradients = _batched(outputs, self._parameters, seeds)
                for g, place in zip(gradients, range(len(self._parameters)), strict=True):
                    if g is not None:
                        columns = slice(self._offsets[place], self._offsets[place + 1])
                        A[k * count + start : k * count + stop, columns] = g.flatten(1).to(wide)
        index = torch.arange(self.num_weights, device=outputs.device)
        double = outputs.dtype == torch.float64
        return Jacobian([Dense(A, index)], len(A), self.num_weights, like, double=double)


def _batched(outputs: Tensor, parameters: Sequence[Tensor], seeds: Tensor) -> Sequence[Tensor | None]:
    """Gradients for several seeds at once; one after the other where an operation cannot be batched."""
    try:
        found: Sequence[Tensor | None] = torch.autograd.grad(
            outputs, parameters, seeds, retain_graph=True, allow_unused=True, is_grads_batched=True
        )
        return found
    except RuntimeError:
        each = [torch.autograd.grad(outputs, parameters, seed, retain_graph=True, allow_unused=True) for seed in seeds]
        return [
            None if all(g is None for g in column) else torch.stack([
                torch.zeros_like(p) if g is None else g for g in column
            ])
            for p, column in zip(parameters, zip(*each, strict=True), strict=True)
        ]  # fmt: skip


def flat(tensors: Sequence[Tensor | None], like: Sequence[Tensor]) -> Tensor:
    """(P,) all of them one after the other, zeros for None; in the widest of the types."""
    parts = [torch.zeros_like(p) if t is None else t for t, p in zip(tensors, like, strict=True)]
    return torch.cat([t.detach().reshape(-1).to(weights.accumulate_dtype(t.device)) for t in parts])


def _grouped(rows: Tensor, layout: _Layout, like: Tensor) -> Tensor:
    """(N, c, q) of rows (M, q), zero where a residual has fewer than c."""
    padded = torch.cat([rows, rows.new_zeros(1, rows.shape[1])]) if int(layout.order.max()) == len(rows) else rows
    return padded[layout.order].to(like.dtype)


def _outer(use: Use, layout: _Layout, D: Tensor, repeats: int, offset: int) -> Outer:
    assert use.data is not None
    Z = _grouped(use.data.detach(), layout, D)
    Z = Z.repeat(repeats, 1, 1) if repeats > 1 else Z
    left, right = (D, Z) if use.layout == "columns" else (Z, D)
    return Outer(left, right, offset + use.index)


@dataclass(frozen=True, slots=True)
class _Parts:
    """Gradients of an elementwise use or of a lookup.

    Attributes:
        D: (R, c, q).
        repeats: Cotangents.
        shape: Of the output.
    """

    D: Tensor
    repeats: int
    shape: tuple[int, ...]


def _scattered(use: Use, layout: _Layout, parts: _Parts, offset: int, size: int) -> Dense:
    """Rows of an elementwise use or of a lookup, added up by the elements of the parameter that they belong to."""
    D, repeats = parts.D, parts.repeats
    if use.kind == "lookup":
        assert use.data is not None
        width = use.view[1]
        rows = use.data.reshape(-1, 1) * width + torch.arange(width, device=D.device)
        places = use.index[rows]  # (M, width)
        values = D
    else:
        places = use.index.view(use.view).expand(parts.shape).reshape(-1, 1)
        data = use.data
        values = D * use.factor
        if data is not None:
            scaled = data.detach().expand(parts.shape).reshape(-1, 1)
            values = values * _grouped(scaled, layout, D).repeat(repeats, 1, 1)
    padded = torch.cat([places, places.new_zeros(1, places.shape[1])])
    where = padded[layout.order].repeat(repeats, 1, 1).flatten(1)  # (R, c * q)
    out = D.new_zeros(len(D), size).scatter_add_(1, where, values.flatten(1))
    return Dense(out, offset + torch.arange(size, device=D.device))


def _merged(group: Sequence[Outer]) -> list[Outer]:
    """Uses of one weight as one block: their products per row are added up."""
    first = group[0]
    same = [b for b in group if torch.equal(b.index, first.index)]
    if len(same) == 1:
        return list(group)
    rest = [b for b in group if not torch.equal(b.index, first.index)]
    return [Outer(torch.cat([b.left for b in same], 1), torch.cat([b.right for b in same], 1), first.index), *rest]


def _without_common_columns(blocks: Sequence[tuple[int, Outer]], written: Sequence[tuple[int, Dense]]) -> list[Block]:
    """Blocks of which no weight belongs to two: those of one parameter are written out and added up.

    Args:
        blocks: With the places of their parameters.
        written: Likewise.
    """
    uses = Counter(place for place, _ in (*blocks, *written))
    alone: list[Block] = [block for place, block in blocks if uses[place] == 1]
    together = [Dense(block.written_out(), block.index) for place, block in blocks if uses[place] > 1]
    together += [dense for _, dense in written]
    if not together:
        return alone
    index = torch.cat([d.index for d in together])
    if all(uses[place] == 1 for place, _ in written) and len(together) == len(written):
        return [*alone, Dense(torch.cat([d.rows for d in together], 1), index)]
    distinct, inverse = torch.unique(index, return_inverse=True)
    rows = together[0].rows.new_zeros(len(together[0].rows), len(distinct))
    start = 0
    for d in together:
        rows.index_add_(1, inverse[start : start + len(d.index)], d.rows)
        start += len(d.index)
    return [*alone, Dense(rows, distinct)]
