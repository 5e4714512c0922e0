"""The basis: directions in weight space, kept tensor by tensor, and their inner products.

Real training feeds it: every step adds the weights and their gradient to running sums; every N
steps the window closes and its mean weights x and mean gradient g give one new pair

    s = x - x_previous        (window displacement)
    y = g - g_previous        (what the gradient did over that displacement)

The displacements s are the columns b_k of the basis, newest first.  Predictors never see them, only
:class:`~.records.Products`; a jump is ``delta = sum_k c[g, k] b_k`` (:meth:`Basis.combine`).

Shape letters: ``P`` weights of one vector, ``G`` groups, ``K`` columns, ``N`` steps of a window.

Where all weights are one group and the model is small they lie in one vector (:class:`.weights.layout.Layout`): a
product with the columns is one product of a matrix then; calls for many small tensors would cost several times that.

Why sums and not an exponential average: a mean over disjoint windows makes successive x
independent of each other's noise, and a pair (s, y) exact for a quadratic loss.  Why Y is not kept:
for the quadratic model only S'Y is needed and S'Y is symmetric, so the products of every older
displacement with the newest y fill both triangles; that halves the memory.  A predictor that leaves the
span of S (``quasi_newton``) asks for Y as columns of their own.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..records import BasisSpec, Hindsight, Products, StateDict
from ..weights import algebra as weights
from ..weights import offload as host
from ..weights.algebra import Move, Tensors, without_graph
from ..weights.layout import Layout
from ..weights.parameters import Groups
from ..weights.products import paired_dots, row_dots, weighted_sum
from ..weights.shards import size_of, total_over

Array = NDArray[np.float64]

#: Below this many weights sums and columns are kept in float64: late in a deterministic run a
#: displacement is some 1e-6 of the weights, and its float32 rounding error would be a tenth of it.
#: At this size the memory does not matter.
FLOAT64_BELOW = 1 << 17
#: Pairs (s, y) after which the products with the gradient are computed anew: in between they are carried by
#: addition, in which those of float32 would lose a digit or two over the four hundred steps of a long ring.
RENEW_EVERY = 50


class Basis:
    """Columns, running sums and inner products over one set of parameters."""

    def __init__(
        self,
        parameters: Sequence[Tensor],
        groups: Groups,
        spec: BasisSpec,
        *,
        dtype: str = "param",
        offload: bool = False,
    ) -> None:
        """Bind to the parameters; memory is taken when the first window closes.

        Args:
            parameters: What :func:`.weights.predicted_parameters` returned.
            groups: Their groups.
            spec: Which directions to keep.
            dtype: ``"float32"``, ``"bfloat16"``, or ``"param"`` (float64 for small models).
            offload: Keep sums and columns in host memory.
        """
        self.parameters = list(parameters)
        self.groups = groups
        self.spec = spec
        small = sum(groups.sizes) < FLOAT64_BELOW
        named = {"float32": torch.float32, "bfloat16": torch.bfloat16}
        devices = [host.CPU if offload else p.device for p in parameters]
        self._offloaded = any(device != p.device for device, p in zip(devices, parameters, strict=True))
        self._landing = host.StagingBuffers()
        self._underway: dict[int, Tensor] = {}  # place in the landing -> sum the copy there is still to be added to
        # sums of bfloat16 weights would lose every bit that matters
        dtypes = [
            torch.promote_types(p.dtype, weights.accumulate_dtype(device) if small else torch.float32)
            for p, device in zip(parameters, devices, strict=True)
        ]
        flat = spec.pooled and groups.num_groups == 1 and groups.num_weights < weights.SMALL
        self._layout = Layout(self.parameters, dtypes, devices, flat=flat)
        self._column_dtypes = [named.get(dtype, wide) for wide in self._layout.dtypes]
        self._members = [[i for i, g in enumerate(groups.index) if g == row] for row in range(groups.num_groups)]
        # numpy writes single rows and numbers several times faster, in the same memory
        self._in_numpy = self._layout.in_one_place and self._column_dtypes[0] in (torch.float32, torch.float64)
        self._rows = [0] if self._layout.flat else list(groups.index)  # group of every vector
        self._sizes = torch.tensor([max(size_of(p), 1) for p in parameters], dtype=torch.float64)
        self._total = total_over(parameters)  # sums over weights are those of all ranks that hold a part

        G, K = groups.num_groups, spec.num_columns
        self.num_steps = 0  # in the open window
        self.num_columns = 0  # displacement columns that hold data
        self.jumped = False  # since the last close
        self._head = 0  # ring position of the newest displacement
        self._sum_theta: Tensors = []
        self._sum_grad: Tensors = []
        self._x: Tensors = []  # mean weights of the last window
        self._g: Tensors = []  # mean gradient of the last window
        self._columns: Tensors = []  # (K, P) per tensor; the ring, then the extras
        self._before: Tensors = []  # weights before the last step of a window, for the optimizer column
        self._BB = torch.zeros(G, K, K, dtype=torch.float64)  # by slot, not by age
        self._BY = torch.zeros(G, *((0, 0) if spec.differences else (K, K)), dtype=torch.float64)
        self._Bg = torch.zeros(G, K, dtype=torch.float64)
        self._gg = torch.zeros(G, dtype=torch.float64)
        self._squared = torch.zeros(len(self.parameters), spec.num_displacements, dtype=torch.float64)

    # ---- observing real steps ----------------------------------------------------------------

    @without_graph
    def accumulate(self) -> None:
        """Add the weights and gradients of one real step: after backward, before the optimizer."""
        if not self._sum_theta:
            self._sum_theta, self._sum_grad = self._layout.zeros(), self._layout.zeros()
        self.num_steps += 1
        if self._layout.flat and not self._offloaded:
            gradients = [g for p in self.parameters if (g := p.grad) is not None and not g.is_sparse]
            if len(gradients) == len(self.parameters):
                self._sum_theta[0].add_(self._layout.gathered(self.parameters))
                self._sum_grad[0].add_(self._layout.gathered(gradients))
                return
        totals = [*self._layout.views(self._sum_theta), *self._layout.views(self._sum_grad)]
        terms: dict[int, Tensor] = dict(enumerate(p.detach() for p in self.parameters))
        for i, p in enumerate(self.parameters, start=len(terms)):
            grad = p.grad
            if grad is not None and not grad.is_sparse:
                terms[i] = grad
        if not self._offloaded:
            torch._foreach_add_(totals if len(terms) == len(totals) else [totals[i] for i in terms], [*terms.values()])
            return
        # added one step later: until then the copies have arrived, and the device does not wait for the sum either
        self._land()
        self._landing.fetch(terms)
        self._underway = {i: totals[i] for i in terms}

    @without_graph
    def add_decay(self, decays: Sequence[float]) -> None:
        """After :meth:`accumulate`: add what the optimizer adds to the gradients of that step.

        Args:
            decays: Of every parameter, per unit of weight.
        """
        for total, p, decay in zip(self._layout.views(self._sum_grad), self.parameters, decays, strict=True):
            total.add_(p.detach().to(total.device), alpha=decay)

    def _land(self) -> None:
        """Add what the last step sent to the host."""
        underway, self._underway = self._underway, {}
        if underway:
            torch._foreach_add_(list(underway.values()), self._landing.arrived(underway))

    def pass_step(self) -> None:
        """Count a real step of a window of which nothing is kept."""
        self.num_steps += 1

    def pass_window(self) -> None:
        """Close a window of which nothing was kept."""
        assert self.num_steps > 0, "an empty window cannot be closed"
        self.num_steps, self.jumped = 0, False

    @without_graph
    def before_step(self, *, last: bool) -> None:
        """Remember the weights before the last step of a window, if the optimizer column is wanted."""
        if last and self.spec.optimizer:
            self._before = self._before or weights.clone(self.parameters)
            torch._foreach_copy_(self._before, [p.detach() for p in self.parameters])

    @without_graph
    def close_window(self) -> Hindsight | None:
        """Turn the sums into means and a new column.

        Returns:
            The new displacement seen through the columns as they were before it, None if there was nothing to
            compare or a jump lies in between, and with differences, which no one forecasts from.
        """
        assert self.num_steps > 0, "an empty window cannot be closed"
        self._land()
        if self.num_steps > 1:
            for tensor in itertools.chain(self._sum_theta, self._sum_grad):
                tensor /= self.num_steps
        hindsight = None
        if self._x:
            s = [new - old for new, old in zip(self._sum_theta, self._x, strict=True)]
            y = [new - old for new, old in zip(self._sum_grad, self._g, strict=True)]
            hindsight = self._insert(s, y)
        # the mean becomes "previous"; the old previous is recycled as the next sum
        self._sum_theta, self._x = self._x, self._sum_theta
        self._sum_grad, self._g = self._g, self._sum_grad
        for tensor in itertools.chain(self._sum_theta, self._sum_grad):
            tensor.zero_()
        self._refresh_extras()
        self._gg = self._by_group(self._squared_norms(self._g))
        self.num_steps = 0
        self.jumped = False
        return hindsight

    def _insert(self, s: Tensors, y: Tensors) -> Hindsight | None:
        if not self._columns:
            K = self.spec.num_columns
            self._columns = [
                torch.zeros(K, size, dtype=dtype, device=device)
                for size, dtype, device in zip(
                    self._layout.sizes, self._column_dtypes, self._layout.devices, strict=True
                )
            ]
        hindsight = None
        # products are those of what is stored
        if any(piece.dtype is not column.dtype for piece, column in zip(s, self._columns, strict=True)):
            s = [piece.to(column.dtype).to(piece.dtype) for piece, column in zip(s, self._columns, strict=True)]
        squares = self._squared_norms(s)
        if self.spec.differences:
            self._advance(s, squares)
            self._insert_difference(s, y, squares)
            return None
        dots = self._dot_columns(s)
        if self.num_columns and not self.jumped:
            hindsight = Hindsight(BB=self._ordered(self._BB), BT=self._ordered(dots), TT=self._by_group(squares))
        self._advance(s, squares)
        dots[:, self._head] = self._by_group(squares)  # this slot held the oldest column until now
        self._BB[:, self._head, :] = self._BB[:, :, self._head] = dots
        if self.spec.curvature:
            along = self._dot_columns(y)
            self._BY[:, self._head, :] = self._BY[:, :, self._head] = along
            # g moved by y, so its product with an older column moved by that column's with y
            self._Bg += along
            dots = self._total(paired_dots(s, self._sum_grad))
            self._Bg[:, self._head] = dots if self._layout.flat else self._by_group(dots)
        return hindsight

    def _advance(self, s: Tensors, squares: Tensor) -> None:
        """Store a displacement over the oldest one; ``squares`` are its squared norms per tensor."""
        num_ring = self.spec.num_displacements
        self._head = (self._head + 1) % num_ring if self.num_columns else 0
        self.num_columns = min(self.num_columns + 1, num_ring)
        self._store(self._head, s)
        self._squared.numpy()[:, self._head] = squares.numpy()

    def _store(self, slot: int, vectors: Tensors) -> None:
        """Write vectors into a slot."""
        if self._in_numpy:
            self._columns[0].numpy()[slot] = vectors[0].numpy()
            return
        for column, piece in zip(self._columns, vectors, strict=True):
            column[slot] = piece.reshape(-1)

    def _insert_difference(self, s: Tensors, y: Tensors, squares: Tensor) -> None:
        """Store y beside its s, with the products that a limited-memory update asks for.

        Those are y with every column; of the new s its length and what it has to do with the y before, no more:
        that is one pass over the columns where all products would be two.
        """
        head, num_ring = self._head, self.spec.num_displacements
        slot, before = num_ring + head, num_ring + (head - 1) % num_ring
        # the same memory: numpy writes single rows of it several times faster
        BB, Bg = self._BB.numpy(), self._Bg.numpy()
        BB[:, head, :] = BB[:, :, head] = 0.0
        BB[:, head, head] = self._by_group(squares).numpy()
        earlier = [column[before].to(v.dtype) for column, v in zip(self._columns, s, strict=True)]
        along = self._dot_columns(y).numpy()
        self._store(slot, y)
        s_before, s_g, y_g, y_y = self._new_products(s, y, earlier)
        if self.num_columns > 1:
            BB[:, head, before] = BB[:, before, head] = s_before
        along[:, slot] = y_y  # this slot held the oldest y until now
        BB[:, slot, :] = BB[:, :, slot] = along
        if head % RENEW_EVERY == RENEW_EVERY - 1:
            self._Bg = self._dot_columns(self._sum_grad)
            return
        Bg += along  # g moved by y
        Bg[:, head], Bg[:, slot] = s_g, y_g

    def _new_products(self, s: Tensors, y: Tensors, before: Tensors) -> tuple[Array, Array, Array, Array]:
        """(G,) each: s'y of the y before, s'g, y'g, |y|^2."""
        if self._layout.flat:
            rows = torch.stack([s[0], y[0], before[0], self._sum_grad[0]])  # one product for all of them
            products = rows[:2] @ rows[1:].T
            s_rows, y_rows = self._total(products if self._in_numpy else products.cpu()).double().numpy()
            return s_rows[1:2], s_rows[2:], y_rows[2:], y_rows[:1]
        y_y = self._by_group(self._squared_norms(y)).numpy()
        pairs = (s, before), (s, self._sum_grad), (y, self._sum_grad)
        s_before, s_g, y_g = (self._by_group(self._total(paired_dots(a, b))).numpy() for a, b in pairs)
        return s_before, s_g, y_g, y_y

    def _refresh_extras(self) -> None:
        if not self._columns:
            return
        for slot, name in enumerate(self.spec.extras, start=self.spec.first_extra):
            if self._in_numpy and name == "lag" and self.spec.differences:  # x - theta, where it belongs
                theta = self._layout.gathered(self.parameters).numpy()
                np.subtract(self._x[0].numpy(), theta, out=self._columns[0].numpy()[slot], casting="same_kind")
                continue
            vectors = self._extra(name)
            self._store(slot, vectors)
            if self.spec.differences:
                continue  # Bg and gg say all that is asked of them, at no pass over the columns
            self._BB[:, slot, :] = self._BB[:, :, slot] = self._dot_columns(vectors)

    def _extra(self, name: str) -> Tensors:
        if name == "lag":
            return [x - p for x, p in zip(self._x, self._layout.joined(self.parameters), strict=True)]
        if name == "optimizer":
            moved = [p.detach() - b for p, b in zip(self.parameters, self._before, strict=True)]
            return self._layout.joined(moved) if self._layout.flat else moved
        return self._g

    # ---- what predictors and the gate read ----------------------------------------------------

    def products(self) -> Products:
        """Inner products of the columns, newest displacement first; in the order of the ring with differences.

        With differences BB is the basis's own, good until the next window closes: windows are single steps there, and
        a copy of all products at each would cost as much as the step of a small network.
        """
        if self.spec.differences:
            return Products(BB=self._BB, BY=self._BY, Bg=self._Bg.clone(), gg=self._gg.clone(), newest=self._head)
        return Products(
            BB=self._ordered(self._BB), BY=self._ordered(self._BY), Bg=self._ordered(self._Bg), gg=self._gg.clone()
        )

    def owns(self, products: Products) -> bool:
        """Whether these are the basis's own, not a copy of them."""
        return products.BB is self._BB

    @without_graph
    def combine(self, coefficients: Tensor, like: tuple[Tensor, Move] | None = None) -> Move:
        """``sum_k c[g, k] b_k``, one tensor per parameter, shaped like it, on its device.

        Args:
            coefficients: (G, K) in the order of :class:`.records.BasisSpec`.
            like: Other coefficients and what came of them: where the new ones are a multiple of these but for the
                columns behind displacements and differences, only those columns are read.

        Raises:
            ValueError: wrong shape.
        """
        expected = (self.groups.num_groups, self.spec.num_columns)
        if tuple(coefficients.shape) != expected:
            raise ValueError(
                f"coefficients have shape {tuple(coefficients.shape)}, the basis needs (G, K) = {expected}"
            )
        if like is not None and self._layout.flat:
            times = multiple(coefficients[0, : self.spec.first_extra], like[0][0, : self.spec.first_extra])
            if times is not None:
                extras = slice(self.spec.first_extra, None)
                return self._shifted(like[1], times, coefficients[:, extras] - times * like[0][:, extras])
        by_slot = self._by_slot(coefficients)
        slots = self._filled
        # once per device: every copy from the host waits for it
        placed = {device: by_slot.to(device, weights.accumulate_dtype(device)) for device in set(self._layout.devices)}
        sums = []
        for column, g in zip(self._columns, self._rows, strict=True):
            row = by_slot[g] if column.dtype is torch.bfloat16 else placed[column.device][g]
            pieces = [weighted_sum(row[filled], column[filled]) for filled in slots]
            total = pieces[0]
            for piece in pieces[1:]:
                total += piece
            sums.append(total)
        return self._per_parameter(sums)

    def _shifted(self, deltas: Move, times: float, rest: Tensor) -> Move:
        """``times * deltas`` and the extra columns at coefficients ``rest`` (1, number of extras)."""
        column, extras = self._columns[0], slice(self.spec.first_extra, None)
        (vector,) = self._layout.joined(deltas)
        total = times * vector
        if self.spec.extras:
            row = rest[0].to(column.device, weights.accumulate_dtype(column.device))
            total += weighted_sum(row.cpu() if column.dtype is torch.bfloat16 else row, column[extras])
        return self._per_parameter([total])

    def _per_parameter(self, vectors: Tensors) -> Move:
        if self._layout.flat:
            found = self._layout.split(vectors)
        else:
            found = [v.reshape(p.shape) for v, p in zip(vectors, self.parameters, strict=True)]
        return [v.to(p.device) for v, p in zip(found, self.parameters, strict=True)] if self._offloaded else found

    def _by_slot(self, coefficients: Tensor) -> Tensor:
        """(G, K) from the order of :class:`.records.BasisSpec` to that of the slots, float64."""
        num_ring, first_extra, newest = self.spec.num_displacements, self.spec.first_extra, self._head
        by_age = coefficients.detach().double().cpu().numpy()
        by_slot = by_age.copy()
        for first in range(0, first_extra, num_ring):
            ring, sorted_ring = by_age[:, first : first + num_ring], by_slot[:, first : first + num_ring]
            # from the newest down to the first slot, then from the last slot down to the one after the newest
            sorted_ring[:, : newest + 1], sorted_ring[:, newest + 1 :] = ring[:, newest::-1], ring[:, :newest:-1]
        return torch.from_numpy(by_slot)

    @property
    def _filled(self) -> list[slice]:
        """Slots that hold data: half of a long ring is empty for half of a short run."""
        n, num_ring = self.num_columns, self.spec.num_displacements
        if n in (0, num_ring):
            return [slice(None)]
        rings = [slice(start, start + n) for start in ((0, num_ring) if self.spec.differences else (0,))]
        return [*rings, slice(self.spec.first_extra, None)] if self.spec.extras else rings

    @property
    def _held(self) -> Tensor | slice:
        """The same as one index: the other slots are zero, and in no checkpoint."""
        slots = self._filled
        return slots[0] if len(slots) == 1 else torch.cat([torch.arange(self.spec.num_columns)[s] for s in slots])

    def _with_empty(self, held: Tensor) -> Tensor:
        """(K, P) from the slots that hold data; from all of them (format 4) as they are."""
        if len(held) == self.spec.num_columns:
            return held
        columns = held.new_zeros(self.spec.num_columns, held.shape[1])
        columns[self._held] = held
        return columns

    def average(self) -> Tensors:
        """x: the mean weights of the last closed window, one tensor per parameter."""
        return [x.to(p.device) for x, p in zip(self._layout.views(self._x), self.parameters, strict=True)]

    def newest(self) -> Tensors:
        """The last window displacement as flat views, one per parameter; they change with the next close."""
        return [v.reshape(-1) for v in self._layout.split([column[self._head] for column in self._columns])]

    @property
    def num_filled(self) -> int:
        """Columns that hold data: what a combination or a product reads."""
        return self.num_columns * (2 if self.spec.differences else 1) + len(self.spec.extras)

    @property
    def ready(self) -> bool:
        """Whether at least one displacement is known."""
        return self.num_columns > 0

    def displacement_rms(self) -> Tensor:
        """(number of tensors,) root of the summed mean squares of the displacements: what the basis spans."""
        return (self._squared.sum(dim=1) / self._sizes).sqrt()

    def memory_bytes(self) -> dict[str, int]:
        """Bytes held, by device type."""
        held: dict[str, int] = {}
        for t in (*self._sum_theta, *self._sum_grad, *self._x, *self._g, *self._columns, *self._before):
            held[t.device.type] = held.get(t.device.type, 0) + t.numel() * t.element_size()
        if self._offloaded:
            held["cpu"] = held.get("cpu", 0) + self._landing.memory_bytes()
        return held

    # ---- jumps ----------------------------------------------------------------------------------

    @without_graph
    def translate(self, deltas: Sequence[Tensor], scale: float) -> None:
        """Tell the basis that the weights were moved by a jump.

        With curvature the pair across the jump stays a true secant pair (the gradient did change
        over it).  Without, the anchor moves along, or the next displacement would take the jump for
        drift and feed it back.
        """
        self.jumped = True
        self.restart_window()
        if not self.spec.curvature:
            # all at once: an interruption finds none of them moved or all
            self._x = [x.add(d, alpha=scale) for x, d in zip(self._x, self._layout.joined(deltas), strict=True)]

    def mark(self) -> StateDict:
        """What :meth:`revert` needs after :meth:`translate`.  Columns are not part of it: they stay true."""
        return {"jumped": self.jumped, "x": [] if self.spec.curvature else weights.clone(self._layout.split(self._x))}

    def revert(self, mark: StateDict) -> None:
        """The weights were taken back to where they were at ``mark``."""
        self.restart_window()
        self.jumped = mark["jumped"] or self.spec.curvature
        for x, old in zip(self._layout.split(self._x), mark["x"], strict=False):
            x.copy_(old)

    def restart_window(self) -> None:
        """Forget the open window."""
        self.num_steps = 0
        self._underway = {}
        for tensor in itertools.chain(self._sum_theta, self._sum_grad):
            tensor.zero_()

    def release(self) -> None:
        """Forget everything, and give the memory back."""
        self.restart()
        self._sum_theta, self._sum_grad, self._before = [], [], []
        self._landing = host.StagingBuffers()

    def restart(self) -> None:
        """Forget everything: the weights were changed by somebody else, or other ones are trained now."""
        self.restart_window()
        self.num_columns = self._head = 0
        self.jumped = False
        self._x, self._g, self._columns = [], [], []
        for products in (self._BB, self._BY, self._Bg, self._gg, self._squared):
            products.zero_()

    # ---- state -------------------------------------------------------------------------------------

    def state_dict(self) -> StateDict:
        """Everything, as plain containers and tensors."""
        self._land()
        split = self._layout.split
        return {
            "num_steps": self.num_steps, "num_columns": self.num_columns, "jumped": self.jumped, "head": self._head,
            # at the beginning of a window they are zero
            "sum_theta": list(split(self._sum_theta)) if self.num_steps else [],
            "sum_grad": list(split(self._sum_grad)) if self.num_steps else [],
            "x": list(split(self._x)), "g": list(split(self._g)),
            "columns": self._layout.split_rows([column[self._held] for column in self._columns]),
            "before": list(self._before),
            "BB": self._BB, "BY": self._BY, "Bg": self._Bg, "gg": self._gg, "squared": self._squared,
        }  # fmt: skip

    def load_state_dict(self, state: StateDict) -> None:
        """Inverse of :meth:`state_dict`, with copies on the devices of this basis."""

        def placed(name: str) -> Tensors:
            return [t.clone() for t in self._layout.joined(state[name])] if state[name] else []

        self._underway = {}
        self.num_steps, self.num_columns = state["num_steps"], state["num_columns"]
        self.jumped, self._head = state["jumped"], state["head"]
        self._sum_theta, self._sum_grad = placed("sum_theta"), placed("sum_grad")
        self._x, self._g = placed("x"), placed("g")
        self._columns = [self._with_empty(c) for c in self._layout.joined_rows(state["columns"], self._column_dtypes)]
        self._before = [t.to(p.device, copy=True) for t, p in zip(state["before"], self.parameters, strict=False)]
        self._BB, self._BY = state["BB"].clone(), state["BY"].clone()
        self._Bg, self._gg = state["Bg"].clone(), state["gg"].clone()
        self._squared = state["squared"].clone()

    # ---- helpers -------------------------------------------------------------------------------------

    def _slots(self) -> list[int]:
        """Ring slots, newest first, the differences' in the same order, then the extras."""
        num_ring, first_extra = self.spec.num_displacements, self.spec.first_extra
        ring = [(self._head - age) % num_ring for age in range(num_ring)]
        differences = [num_ring + slot for slot in ring] if self.spec.differences else []
        return [*ring, *differences, *range(first_extra, self.spec.num_columns)]

    def _ordered(self, by_slot: Tensor) -> Tensor:
        slots = self._slots()
        return by_slot[:, slots][:, :, slots] if by_slot.dim() == 3 else by_slot[:, slots]

    def _dot_columns(self, vectors: Sequence[Tensor]) -> Tensor:
        """(G, K) inner products of every slot with one vector given tensor by tensor."""
        found = torch.zeros(self.groups.num_groups, self.spec.num_columns, dtype=torch.float64)
        if not self._columns:
            return found
        # with differences nobody asks for products of the extras
        slots = self._filled[:2] if self.spec.differences else self._filled
        column = self._columns[0]
        if self._in_numpy and column.dtype is torch.float64:
            row, vector = found[0], vectors[0]
            for filled in slots:
                torch.mv(column[filled], vector, out=row[filled])
            return self._total(found)
        for filled in slots:
            dots = weights.on_host(
                [row_dots(column[filled], v.reshape(-1)) for column, v in zip(self._columns, vectors, strict=True)]
            )
            found[:, filled] = dots if self._layout.flat else self._grouped(dots)
        return self._total(found)

    def _squared_norms(self, vectors: Tensors) -> Tensor:
        """(number of parameters,) in float64 on the CPU, of all ranks' parts."""
        return self._total(self._layout.squared_norms(vectors))

    def _by_group(self, per_tensor: Tensor) -> Tensor:
        """(number of tensors,) -> (G,) sums."""
        return self._grouped(per_tensor)

    def _grouped(self, per_tensor: Tensor) -> Tensor:
        """(number of tensors, ...) -> (G, ...) sums."""
        if len(self._members) == 1:
            return per_tensor.sum(dim=0, keepdim=True)
        return torch.stack([per_tensor[members].sum(dim=0) for members in self._members])


def multiple(values: Tensor, of: Tensor) -> float | None:
    """m with ``values = m * of`` up to rounding, both (n,) in host memory; None where there is none."""
    a, b = values.numpy(), of.numpy()
    size = float(b @ b)
    if not size > 0:
        return None
    m = float(a @ b) / size
    return m if float(np.abs(a - m * b).max()) <= 1e-14 * abs(m) * math.sqrt(size) else None
