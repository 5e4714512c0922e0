"""The basis: directions in weight space, kept tensor by tensor, and their inner products.

Real training feeds it: every step adds the weights and their gradient to running sums; every N
steps the window closes and its mean weights x and mean gradient g give one new pair

    s = x - x_previous        (window displacement)
    y = g - g_previous        (what the gradient did over that displacement)

The displacements s are the columns b_k of the basis, newest first.  Predictors never see them, only
:class:`~.records.Products`; a jump is ``delta = sum_k c[g, k] b_k`` (:meth:`Basis.combine`).

Shape letters: ``P`` weights of one tensor, ``G`` groups, ``K`` columns, ``N`` steps of a window.

Why sums and not an exponential average: a mean over disjoint windows makes successive x
independent of each other's noise, and a pair (s, y) exact for a quadratic loss.  Why Y is not kept:
for the quadratic model only S'Y is needed and S'Y is symmetric, so the products of every older
displacement with the newest y fill both triangles; that halves the memory.  A predictor that leaves the
span of S (``quasi_newton``) asks for Y as columns of their own.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from ..records import BasisSpec, Hindsight, Products, StateDict
from ..weights import algebra as weights
from ..weights import offload as host
from ..weights.algebra import Tensors
from ..weights.parameters import Groups
from ..weights.products import paired_dots, row_dots, squared_norms, weighted_sum

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
        self._devices = [host.CPU if offload else p.device for p in parameters]
        self._offloaded = any(device != p.device for device, p in zip(self._devices, parameters, strict=True))
        self._landing = host.StagingBuffers()
        self._underway: dict[int, Tensor] = {}  # place in the landing -> sum the copy there is still to be added to
        # sums of bfloat16 weights would lose every bit that matters
        self._sum_dtypes = [
            torch.promote_types(p.dtype, weights.accumulate_dtype(device) if small else torch.float32)
            for p, device in zip(parameters, self._devices, strict=True)
        ]
        self._column_dtypes = [named.get(dtype, wide) for wide in self._sum_dtypes]
        self._group_slices = [[i for i, g in enumerate(groups.index) if g == row] for row in range(groups.num_groups)]

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

    @torch.no_grad()
    def accumulate(self) -> None:
        """Add the weights and gradients of one real step: after backward, before the optimizer."""
        if not self._sum_theta:
            self._sum_theta = [self._zeros(i) for i in range(len(self.parameters))]
            self._sum_grad = [self._zeros(i) for i in range(len(self.parameters))]
        self.num_steps += 1
        totals = dict(enumerate([*self._sum_theta, *self._sum_grad]))
        terms: dict[int, Tensor] = dict(enumerate(p.detach() for p in self.parameters))
        for i, p in enumerate(self.parameters, start=len(terms)):
            if p.grad is not None and not p.grad.is_sparse:
                terms[i] = p.grad
        if not self._offloaded:
            torch._foreach_add_([totals[i] for i in terms], list(terms.values()))
            return
        # added one step later: until then the copies have arrived, and the device does not wait for the sum either
        self._land()
        self._landing.fetch(terms)
        self._underway = {i: totals[i] for i in terms}

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

    @torch.no_grad()
    def before_step(self, *, last: bool) -> None:
        """Remember the weights before the last step of a window, if the optimizer column is wanted."""
        if last and self.spec.optimizer:
            self._before = self._before or weights.clone(self.parameters)
            torch._foreach_copy_(self._before, [p.detach() for p in self.parameters])

    @torch.no_grad()
    def close_window(self) -> Hindsight | None:
        """Turn the sums into means and a new column.

        Returns:
            The new displacement seen through the columns as they were before it, None if there was nothing to
            compare or a jump lies in between, and with differences, which no one forecasts from.
        """
        assert self.num_steps > 0, "an empty window cannot be closed"
        self._land()
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
        self._gg = self._by_group(squared_norms(self._g))
        self.num_steps = 0
        self.jumped = False
        return hindsight

    def _insert(self, s: Tensors, y: Tensors) -> Hindsight | None:
        if not self._columns:
            K = self.spec.num_columns
            self._columns = [
                torch.zeros(K, p.numel(), dtype=dtype, device=device)
                for p, dtype, device in zip(self.parameters, self._column_dtypes, self._devices, strict=True)
            ]
        hindsight = None
        # products are those of what is stored
        s = [piece.to(column.dtype).to(piece.dtype) for piece, column in zip(s, self._columns, strict=True)]
        squares = squared_norms(s)
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
            self._Bg[:, self._head] = self._by_group(paired_dots(s, self._sum_grad))
        return hindsight

    def _advance(self, s: Tensors, squares: Tensor) -> None:
        """Store a displacement over the oldest one; ``squares`` are its squared norms per tensor."""
        num_ring = self.spec.num_displacements
        self._head = (self._head + 1) % num_ring if self.num_columns else 0
        self.num_columns = min(self.num_columns + 1, num_ring)
        for column, piece in zip(self._columns, s, strict=True):
            column[self._head] = piece.reshape(-1).to(column.dtype)
        self._squared[:, self._head] = squares

    def _insert_difference(self, s: Tensors, y: Tensors, squares: Tensor) -> None:
        """Store y beside its s, with the products that a limited-memory update asks for.

        Those are y with every column; of the new s its length and what it has to do with the y before, no more:
        that is one pass over the columns where all products would be two.
        """
        head, num_ring = self._head, self.spec.num_displacements
        slot, before = num_ring + head, num_ring + (head - 1) % num_ring
        self._BB[:, head, :] = self._BB[:, :, head] = 0.0
        self._BB[:, head, head] = self._by_group(squares)
        if self.num_columns > 1:
            along_before = self._by_group(
                paired_dots(s, [column[before].to(v.dtype) for column, v in zip(self._columns, s, strict=True)])
            )
            self._BB[:, head, before] = self._BB[:, before, head] = along_before
        along = self._dot_columns(y)
        for column, piece in zip(self._columns, y, strict=True):
            column[slot] = piece.reshape(-1).to(column.dtype)
        along[:, slot] = self._by_group(squared_norms(y))  # this slot held the oldest y until now
        self._BB[:, slot, :] = self._BB[:, :, slot] = along
        if head % RENEW_EVERY == RENEW_EVERY - 1:
            self._Bg = self._dot_columns(self._sum_grad)
            return
        self._Bg += along  # g moved by y
        self._Bg[:, head] = self._by_group(paired_dots(s, self._sum_grad))
        self._Bg[:, slot] = self._by_group(paired_dots(y, self._sum_grad))

    def _refresh_extras(self) -> None:
        if not self._columns:
            return
        for slot, name in enumerate(self.spec.extras, start=self.spec.first_extra):
            vectors = self._extra(name)
            for column, vector in zip(self._columns, vectors, strict=True):
                column[slot].copy_(vector.reshape(-1))
            if self.spec.differences:
                continue  # Bg and gg say all that is asked of them, at no pass over the columns
            self._BB[:, slot, :] = self._BB[:, :, slot] = self._dot_columns(vectors)

    def _extra(self, name: str) -> Tensors:
        if name == "lag":
            return [x - p.to(device=x.device, dtype=x.dtype) for x, p in zip(self._x, self.parameters, strict=True)]
        if name == "optimizer":
            return [p.detach() - b for p, b in zip(self.parameters, self._before, strict=True)]
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

    @torch.no_grad()
    def combine(self, coefficients: Tensor) -> Tensors:
        """``sum_k c[g, k] b_k``, one tensor per parameter, shaped like it, on its device.

        Args:
            coefficients: (G, K) in the order of :class:`.records.BasisSpec`.

        Raises:
            ValueError: wrong shape.
        """
        expected = (self.groups.num_groups, self.spec.num_columns)
        if tuple(coefficients.shape) != expected:
            raise ValueError(
                f"coefficients have shape {tuple(coefficients.shape)}, the basis needs (G, K) = {expected}"
            )
        by_slot = torch.zeros_like(coefficients, dtype=torch.float64)
        by_slot[:, self._slots()] = coefficients.double()
        # once per device: every copy from the host waits for it
        placed = {device: by_slot.to(device, weights.accumulate_dtype(device)) for device in set(self._devices)}
        slots, deltas = self._filled, []
        for column, g, p in zip(self._columns, self.groups.index, self.parameters, strict=True):
            row = by_slot[g] if column.dtype is torch.bfloat16 else placed[column.device][g]
            pieces = [weighted_sum(row[filled], column[filled]) for filled in slots]
            deltas.append(sum(pieces[1:], pieces[0]).reshape(p.shape).to(p.device))
        return deltas

    @property
    def _filled(self) -> list[slice]:
        """Slots that hold data: half of a long ring is empty for half of a short run."""
        n, num_ring = self.num_columns, self.spec.num_displacements
        if n in (0, num_ring):
            return [slice(None)]
        rings = [slice(start, start + n) for start in ((0, num_ring) if self.spec.differences else (0,))]
        return [*rings, slice(self.spec.first_extra, None)] if self.spec.extras else rings

    def average(self) -> Tensors:
        """x: the mean weights of the last closed window, one tensor per parameter."""
        return [x.to(p.device) for x, p in zip(self._x, self.parameters, strict=True)]

    def newest(self) -> Tensors:
        """The last window displacement as flat views, one per parameter; they change with the next close."""
        return [column[self._head] for column in self._columns]

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
        sizes = torch.tensor([max(p.numel(), 1) for p in self.parameters], dtype=torch.float64)
        return (self._squared.sum(dim=1) / sizes).sqrt()

    def memory_bytes(self) -> dict[str, int]:
        """Bytes held, by device type."""
        held: dict[str, int] = {}
        for t in (*self._sum_theta, *self._sum_grad, *self._x, *self._g, *self._columns, *self._before):
            held[t.device.type] = held.get(t.device.type, 0) + t.numel() * t.element_size()
        if self._offloaded:
            held["cpu"] = held.get("cpu", 0) + self._landing.memory_bytes()
        return held

    # ---- jumps ----------------------------------------------------------------------------------

    @torch.no_grad()
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
            self._x = [
                x.add(d.to(device=x.device, dtype=x.dtype), alpha=scale) for x, d in zip(self._x, deltas, strict=True)
            ]

    def mark(self) -> StateDict:
        """What :meth:`revert` needs after :meth:`translate`.  Columns are not part of it: they stay true."""
        return {"jumped": self.jumped, "x": [] if self.spec.curvature else weights.clone(self._x)}

    def revert(self, mark: StateDict) -> None:
        """The weights were taken back to where they were at ``mark``."""
        self.restart_window()
        self.jumped = mark["jumped"] or self.spec.curvature
        for x, old in zip(self._x, mark["x"], strict=False):
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
        return {
            "num_steps": self.num_steps, "num_columns": self.num_columns, "jumped": self.jumped, "head": self._head,
            "sum_theta": list(self._sum_theta), "sum_grad": list(self._sum_grad),
            "x": list(self._x), "g": list(self._g),
            "columns": list(self._columns), "before": list(self._before),
            "BB": self._BB, "BY": self._BY, "Bg": self._Bg, "gg": self._gg, "squared": self._squared,
        }  # fmt: skip

    def load_state_dict(self, state: StateDict) -> None:
        """Inverse of :meth:`state_dict`, with copies on the devices of this basis."""

        def placed(name: str) -> Tensors:
            return [t.to(device, copy=True) for t, device in zip(state[name], self._devices, strict=False)]

        self._underway = {}
        self.num_steps, self.num_columns = state["num_steps"], state["num_columns"]
        self.jumped, self._head = state["jumped"], state["head"]
        self._sum_theta, self._sum_grad = placed("sum_theta"), placed("sum_grad")
        self._x, self._g, self._columns = placed("x"), placed("g"), placed("columns")
        self._before = [t.to(p.device, copy=True) for t, p in zip(state["before"], self.parameters, strict=False)]
        self._BB, self._BY = state["BB"].clone(), state["BY"].clone()
        self._Bg, self._gg = state["Bg"].clone(), state["gg"].clone()
        self._squared = state["squared"].clone()

    # ---- helpers -------------------------------------------------------------------------------------

    def _zeros(self, i: int) -> Tensor:
        return torch.zeros(self.parameters[i].shape, dtype=self._sum_dtypes[i], device=self._devices[i])

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
        if not self._columns:
            return torch.zeros(self.groups.num_groups, self.spec.num_columns, dtype=torch.float64)
        found = torch.zeros(self.groups.num_groups, self.spec.num_columns, dtype=torch.float64)
        for filled in self._filled:
            dots = weights.on_host(
                [row_dots(column[filled], v.reshape(-1)) for column, v in zip(self._columns, vectors, strict=True)]
            )
            found[:, filled] = torch.stack([dots[members].sum(dim=0) for members in self._group_slices])
        return found

    def _by_group(self, per_tensor: Tensor) -> Tensor:
        """(number of tensors,) -> (G,) sums."""
        return torch.stack([per_tensor[members].sum() for members in self._group_slices])
