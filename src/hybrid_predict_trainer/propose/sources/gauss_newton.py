"""``gauss_newton``: where training of the linearised model leads, and on from there.

In the lazy regime (wide networks, the end of training, fine-tuning) a model is linear in the weights along its
training, and the weights Y steps ahead have a closed form (:mod:`...numerics.closed_form`).  Here the model is
linearised at the present weights, moved to where gradient flow for a time t = 1 / damping would lead, and linearised
again there: the time that is believed is found by comparing the true reduction of the loss with the predicted one, as
trust-region methods do (Conn, Gould & Toint, Trust-Region Methods, 2000, section 6.1).  With the rational filter each
such move is a step of Levenberg and Marquardt.

Nonlinearity is corrected once per move (geodesic acceleration: Transtrum & Sethna, arXiv 1207.4999): the residuals at
theta + d differ from those of the linear model by half the second derivative along d, and solving with the same
factorisation for that difference bends the step back on to the curve.  It costs a forward and a product; on narrow
valleys, which the losses of differential equations are, it is worth a factor of ten to a thousand in the final loss
(docs/benchmarks.md).

Where there are many residuals, their kernel is formed of a sample of them (:mod:`.sample`).  The Jacobian is that of
all, since it costs little beside the kernel: it tells before any forward how much of what the sample promises holds for
those left out.  Where too little does, the sample grows.

A proposal is a chain of such moves.  The gate judges where it ends by the run's own loss function.

Where every batch is a new one (:mod:`.stream`) a proposal is one move, and what becomes of it is seen on the next
batches: jumps and plain steps take turns, and weights of before come back where a batch that neither has fitted says
that they are better.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...config.settings import GaussNewtonConfig
from ...cost import BACKWARD_UNITS, FORWARD_UNITS
from ...keep.isolation import isolated
from ...keep.loss_modules import Reach
from ...records import BasisSpec, PhasePrediction, StateDict, Verdict, Window
from ...weights import algebra as weights
from ...weights.real_views import all_differentiable
from . import price
from .base import Material, Move, Source
from .flat import displacement, flat, joined, put, split
from .jacobian import Jacobian, Linearizer
from .least_squares import Convex, LeastSquares, Point, ResidualError
from .sample import GOLDEN
from .solve import Averaged, Form, Linearized, Sampled, form_for
from .stream import Stream

#: Dampings tried at one linearisation, at most.
MAX_TRIES = 12
#: Factors on the damping after a move that was refused, that gained less than a quarter of what was predicted, and that
#: was good.
RAISE, HOLD, LOWER = 4.0, 2.0, 1 / 3
#: Relative error of the linear model below which it is taken for exact, and the factor there.
LINEAR, LOWER_LINEAR = 1e-3, 1e-4
#: Ratio of true and predicted reduction below which the damping grows.
POOR = 0.25
#: Smallest and largest relative damping.
LEAST, MOST = 1e-16, 1e8
#: Longest correction of second order, in lengths of half the step (Transtrum & Sethna, section 4).
MAX_BEND = 0.75
#: Relative difference between the run's loss and the one of the residuals that passes for rounding, and an absolute one
#: where the loss is a difference of larger numbers, as a cross-entropy in float32 is.
SAME_LOSS, ROUNDING = 1e-2, 1e-6
#: Where the predicted loss curve is told, as shares of the time that is believed.
CURVE = (0.25, 0.5, 1.0)
#: Passes of one move, in forwards: two at its beginning with a backward, and two on trial.
LEAST_PASSES = 6.0
#: Moves before which the damping has not found its place.
TRIAL_MOVES = 2
#: Factor between dampings tried at one linearisation to find a smaller one, and how many at most.
SEARCH, MAX_SEARCH = 0.1, 4
#: Moves after which that is tried again.
SEARCH_EVERY = 8
#: Forwards with which the gate judges a move.
JUDGED = 2.0
#: Weights up to which a curvature is averaged over batches.
LARGEST_AVERAGED = 1024
#: Rows of a sample, at least; share of all rows from which on all are taken.
LEAST_ROWS, MOST_SHARE = 64, 0.6
#: Price of the first sample's matrix, in prices of a move's passes through the model.
BALANCE = 0.5
#: Share of what a sample promises that all rows must confirm; factor by which it grows where they do not.
CONFIRMED, GROWTH = 0.25, 1.5
#: The same where the linear model is taken for exact.
GROWTH_LINEAR = 4.0
#: Ratio of losses on a batch that neither has seen from which on weights are the worse ones.
WORSE = 1.01
#: Relative error of the linear model below which training counts as lazy.
LAZY = 0.1


Solver = Linearized | Sampled


class _Spent:
    """What a proposal has cost so far.

    Attributes:
        forwards, backwards: Through the model.
        matrix_forwards: Price of the matrix work, in forwards.
    """

    def __init__(self) -> None:
        self.forwards = self.backwards = self.matrix_forwards = 0.0

    def forward(self) -> None:
        """One was made."""
        self.forwards += 1

    def backward(self, number: float) -> None:
        """So many were made."""
        self.backwards += number

    def linearized(self, model: Solver) -> None:
        """The matrix, its factors, and products beside them."""
        self.matrix_forwards += model.price

    @property
    def in_forwards(self) -> float:
        """Everything."""
        return self.forwards + self.backwards * BACKWARD_UNITS / FORWARD_UNITS + self.matrix_forwards


@dataclass(slots=True)
class _Walk:
    """Where a chain of moves stands.

    Attributes:
        x: (P,) weights that may be moved, in the widest type.
        point: Loss and residuals there.
        predicted: Sum of predicted reductions.
        time: Sum of the times of gradient flow.
    """

    x: Tensor
    point: Point
    predicted: float = 0.0
    time: float = 0.0


class GaussNewton(Source):
    """Closed-form training of the linearised model; see the module.

    Attributes:
        chain: Proposals that may follow one another without a real step between them.
        damping: Relative to the mean eigenvalue of the kernel.
        stream: Turns of jumps and plain steps where batches are new.
        searches: Where a move is good, smaller dampings are tried at the same linearisation for as long as that helps,
            and no more after the first one that does not, for some moves or until somebody else has moved the weights.
        linearity: Mean relative error of the linear model at the moves of the last proposal; NaN before.
    """

    name = "gauss_newton"
    takes_fresh = True

    def __init__(
        self, config: GaussNewtonConfig, problem: LeastSquares | Convex, rate: Callable[[], float],
        *, longest: int, seed: int,
    ) -> None:  # fmt: skip
        """Bind.

        Args:
            config: Settings.
            problem: :class:`LeastSquares` or :class:`Convex`.
            rate: Learning rate of the next real step: tells how many steps a time of gradient flow is.
            longest: Steps that a move may claim to be worth, at most.
            seed: Of the preconditioner.
        """
        self._longest = longest
        self.config, self.chain = config, config.chain
        self._problem, self._rate, self._seed = problem, rate, seed
        self._reach = Reach(problem)
        self.spec = BasisSpec(num_displacements=1)
        self.damping = config.initial_damping
        self.searches = self._searching = False
        self.linearity = math.nan
        self.num_moves = 0
        self._needs_graph = False  # the residuals differentiate inside: they cannot be had without grad mode
        self._mismatch = ""  # why the residuals are not those of the run's loss
        self._compared = False  # the run's loss with that of the residuals
        self._best: list[Tensor] | None = None  # where a chain ended that could not go on
        self._best_loss = math.inf
        self._best_is_stale = False  # its loss is that of another batch
        self.stream = Stream()
        self._anchor: list[Tensor] | None = None  # where a block of jumps on new batches began
        self._curvature: Tensor | None = None  # (P, P) averaged over batches
        self._num_averaged = 0
        self._proposed: tuple[float, list[Tensor]] | None = None  # loss before, weights it leads to
        self._linearizer: Linearizer | None = None
        self._movable: list[bool] = []
        self._price_of_move = 0.0  # forwards, of the last one
        self._growth = 1.0  # of the sample of rows, since the first one

    def search_dampings(self) -> None:
        """Where a move is good, try smaller dampings at the same linearisation from here on."""
        self.searches = True

    def memory_bytes(self) -> int:
        """Weights to come back to, and an averaged curvature."""
        held = [*(self._best or ()), *(self._anchor or ()), *([] if self._curvature is None else [self._curvature])]
        return sum(t.numel() * t.element_size() for t in held)

    def on_data(self, num_different: int) -> None:
        """See :class:`Source`."""
        self.stream.on_data(num_different)
        if num_different:
            self._best_is_stale = True

    @property
    def ready(self) -> bool:
        """Not while plain steps have their turn, unless the run ends."""
        return self.stream.jumping or self._num_asked > 0

    def observe(self, window: Window) -> None:
        """The loss of a real step tells how plain steps get on."""
        if self.stream.fresh:
            self.stream.on_step(window.loss)

    # ---- proposals ---------------------------------------------------------------------------------------

    def propose(self, material: Material) -> Move:
        """A chain of moves from the present weights.

        Raises:
            ResidualError: what the user's function returned is no residuals.
            ArithmeticError: nothing can be solved for.
        """
        if self._mismatch:
            raise ResidualError(self._mismatch)
        if not all_differentiable(material.parameters):
            raise ResidualError("gauss_newton needs real parameters, and some are complex or of a subclass of Tensor")
        self._prepare(material)
        live = [p for p, may in zip(material.parameters, material.movable, strict=True) if may]
        if not live:
            raise ResidualError("no parameter may be moved")
        before = weights.clone(live)
        spent = _Spent()
        try:
            with isolated(material.model, "training" if material.exact else "quiet", reach=self._reach) as isolation:

                def at(x: Tensor, *, graph: bool) -> Point:
                    put(live, x)
                    isolation.begin()
                    spent.forward()
                    return self._at(material, graph=graph)

                walk, first = self._walk(flat(live), at, spent, material.room)
            end = [t.clone() for t in split(walk.x, live)]
        finally:
            weights.copy_(live, before)
        return self._move(material, walk, first, end, spent)

    def _prepare(self, material: Material) -> None:
        """A linearizer of the weights that may be moved now."""
        if self._movable != material.movable:
            if self._movable:
                self.overwritten()
            self._linearizer, self._movable = None, list(material.movable)
        if self._linearizer is None:
            movable = [p for p, may in zip(material.parameters, material.movable, strict=True) if may]
            c = self.config
            self._linearizer = Linearizer(movable, chunk_rows=c.chunk_rows, memory_mb=c.memory_mb)

    def _at(self, material: Material, *, graph: bool) -> Point:
        """Residuals at the model's weights; falls back on grad mode where they differentiate inside."""
        if not graph and not self._needs_graph:
            try:
                with torch.no_grad():
                    return self._problem.at(material.model, material.batch)
            except RuntimeError as error:
                if "does not require grad" not in str(error):
                    raise
                self._needs_graph = True
        with torch.enable_grad():
            return self._problem.at(material.model, material.batch)

    def _walk(self, x: Tensor, at: Callable[..., Point], spent: _Spent, room: float) -> tuple[_Walk, float]:
        """Moves from x, or from the best weights known where these are better; returns the loss at x as well."""
        if self.stream.fresh:
            return self._walk_on_new_batch(x, at, spent, room)
        walk, first = self._start(x, at)
        if not math.isfinite(walk.point.loss):
            raise ArithmeticError("the loss of the residuals is not finite")
        errors: list[float] = []
        leads_back = not torch.equal(walk.x, x)  # which is a proposal by itself
        for number in range(self.config.linearizations):
            before = spent.in_forwards
            if before + self._price_of_move > room or ((number or leads_back) and before >= self.allowance):
                break
            if not self._step(walk, at, spent, errors, room, first=number == 0):
                break
        if errors:
            self.linearity = sum(errors) / len(errors)
        return walk, first

    def _walk_on_new_batch(
        self, x: Tensor, at: Callable[..., Point], spent: _Spent, room: float
    ) -> tuple[_Walk, float]:
        """One move, from the best of the weights here, where the last jump led, and where this block began.

        A batch that none of them has fitted compares them.
        """
        then = [(None if w is None else joined(w, x), factor) for w, factor in (
            (self._best, 1.0), (self._anchor if self.stream.block_ends else None, WORSE))]  # fmt: skip
        others = [(w, factor) for w, factor in then if w is not None and not torch.equal(w, x)]
        point = at(x, graph=not others)
        start, first, loss, fell_back = x, point.loss, point.loss, False
        for known, factor in others:
            there = at(known, graph=False).loss
            if not loss <= factor * there:
                start, loss, fell_back = known, there, factor == WORSE
        if self.stream.block_begins:
            self._anchor = [start.clone()]
        point = at(start, graph=True) if others else point
        if not math.isfinite(point.loss):
            raise ArithmeticError("the loss of the residuals is not finite")
        walk, errors = _Walk(start, point), list[float]()
        moved = spent.in_forwards + self._price_of_move <= room and self._step(
            walk, at, spent, errors, room, first=self.num_moves == 0
        )
        if errors:
            self.linearity = sum(errors) / len(errors)
        if moved and not fell_back:
            self.stream.on_jump(loss, walk.point.loss, spent.in_forwards + JUDGED)
        else:
            self.stream.on_failure()
        return walk, first

    def _start(self, x: Tensor, at: Callable[..., Point]) -> tuple[_Walk, float]:
        """Where the chain begins, and the loss at x; a graph is of the weights that were evaluated last."""
        home = None if self._best is None else joined(self._best, x)
        if home is not None and not torch.equal(home, x):
            first = at(x, graph=False).loss
            if self._best_is_stale or self._best_loss < first:
                there = at(home, graph=True)
                self._best_loss = there.loss if self._best_is_stale else self._best_loss
                self._best_is_stale = False
                if there.loss < first:
                    return _Walk(home, there), first
        point = at(x, graph=True)
        if self._best_is_stale:
            self._best_loss, self._best_is_stale = math.inf, False
        return _Walk(x, point), point.loss

    def _step(
        self, walk: _Walk, at: Callable[..., Point], spent: _Spent, errors: list[float], room: float, *, first: bool
    ) -> bool:
        """Linearise, and move as far as the linear model holds; False where no damping lowers the loss, or no room is.

        Args:
            walk: Is moved.
            at: Evaluates.
            spent: So far.
            errors: Of the linear model, are added.
            room: Forwards that the proposal may cost in all.
            first: Of this proposal: rows that are read off are checked, and dampings tried until one helps.
        """
        assert self._linearizer is not None
        before, num_cotangents = spent.in_forwards, len(walk.point.cotangents)
        A = self._linearizer.jacobian(walk.point.outputs, walk.point.cotangents, check=first)
        spent.backward(self._linearizer.num_backward(num_cotangents, A.num_rows) + first)
        number = self._sample(A.counts, spent.in_forwards - before)
        needed = LEAST_PASSES + self._price_of_matrices(A.counts, number)
        if before + needed > room:
            self._price_of_move = needed
            return False
        model = self._linearized(A, walk.point.rho, number)
        found, believed = None, self.damping
        for _ in range(MAX_TRIES if model.scale > 0 else 0):
            found = self._tried(walk, model, at, errors, room - spent.in_forwards)
            allowed = math.inf if first else self.allowance  # without a move a linearisation has been for nothing
            over = spent.in_forwards >= allowed or spent.in_forwards + model.price >= room
            if found is not None or self.damping >= MOST or over:
                break
        if found is not None and self.searches and (self._searching or self.num_moves % SEARCH_EVERY == 0):
            self._searching = True
            found = self._searched(walk, model, at, found)
        spent.linearized(model)
        self._price_of_move = spent.in_forwards - before
        if found is None:
            self.damping = believed  # nothing helps here, whatever the damping
            return False
        walk.x, walk.point = found
        self.num_moves += 1
        return True

    def _searched(
        self, walk: _Walk, model: Solver, at: Callable[..., Point], found: tuple[Tensor, Point]
    ) -> tuple[Tensor, Point]:
        """The best of a move and those with smaller dampings, for which the matrix is there already."""
        for _ in range(MAX_SEARCH):
            damping, predicted, duration = self.damping, walk.predicted, walk.time
            self.damping = max(damping * SEARCH, LEAST)
            other = self._tried(walk, model, at, [], 0.0)
            if other is None or not other[1].loss < found[1].loss:
                self._searching = False
                self.damping, walk.predicted, walk.time = damping, predicted, duration
                return found[0], at(found[0], graph=True)  # a graph is of the weights that were evaluated last
            found = other
        return found

    def _sample(self, counts: price.Counts, passes: float) -> int:
        """Rows of a sample whose matrix costs half of what the passes of a move do, times its growth since; or all.

        Args:
            counts: Of all rows.
            passes: Forwards that the backward passes of a linearisation are worth.
        """
        number = rows = counts.num_rows
        if self.config.rows == "all":
            return rows
        while number > LEAST_ROWS and self._price_of_matrices(counts, number) > BALANCE * (LEAST_PASSES + passes):
            number = round(number / GROWTH**0.5)
        number = round(number * self._growth)
        return rows if number >= MOST_SHARE * rows else number

    def _linearized(self, A: Jacobian, rho: Tensor, number: int) -> Solver:
        """The matrix of this batch, or one averaged over batches where that is wanted and small enough."""
        c = self.config
        if self.stream.fresh and self.stream.memory > 1 and A.num_weights <= LARGEST_AVERAGED:
            H = A.normal()
            self._num_averaged = min(self._num_averaged + 1, self.stream.memory)
            if self._curvature is None or self._num_averaged == 1:
                self._curvature, self._num_averaged = H, 1
            else:
                self._curvature += (H - self._curvature) / self._num_averaged
            return Averaged(A, self._curvature, self._num_averaged)

        def solver(part: Jacobian) -> Linearized:
            form = self._form(part.num_rows, part.num_weights)
            return Linearized(part, form, rank=c.cg_rank, max_iterations=c.cg_iterations, seed=self._seed)

        if number < A.num_rows:
            return Sampled(A, rho, number, solver, start=self.num_moves * GOLDEN % 1)
        return solver(A)

    def _form(self, rows: int, num_weights: int) -> Form:
        c = self.config
        return c.form if c.form != "auto" else form_for(
            rows, num_weights, largest=c.largest_matrix, memory_mb=c.memory_mb
        )  # fmt: skip

    def _price_of_matrices(self, counts: price.Counts, number: int) -> float:
        """Forwards that the matrices of a move are worth with one damping, and with so many rows."""
        form, share = self._form(number, counts.num_weights), number / counts.num_rows
        gram, normal = counts.num_gram_products * share**2, counts.num_normal_products * share
        matrix = {"kernel": gram, "weight": normal, "cg": 0.0}[form]
        products = 2 * self.config.cg_iterations * share if form == "cg" else 3
        return price.least_squares(
            replace(counts, num_rows=number), matrix, num_products=products, num_factors=int(form != "cg")
        )

    def _tried(
        self, walk: _Walk, model: Solver, at: Callable[..., Point], errors: list[float], room: float
    ) -> tuple[Tensor, Point] | None:
        """One damping: where it leads if that lowers the loss; damping and sample are set for what comes next.

        Args:
            walk: Is not moved.
            model: Linearised there.
            at: Evaluates.
            errors: Of the linear model, are added.
            room: Forwards that matrices may cost in all, should the sample have to grow.
        """
        damping, before = self.damping * model.scale, walk.point
        try:
            d = model.move(before.rho, damping, self.config.filter)
        except ArithmeticError:
            self.damping = min(max(self.damping * RAISE, LEAST), MOST)
            return None
        bent = walk.x + d
        change = model.A.jvp(d)
        linear = before.rho + change
        predicted = before.loss - _half(before.rho) + _half(linear)
        expected = before.loss - predicted
        if not math.isfinite(expected) or not bool(torch.isfinite(d).all()):
            self.damping = min(self.damping * RAISE, MOST)
            return None
        if isinstance(model, Sampled) and expected < CONFIRMED * model.promised(d):  # it fits itself, not the others
            more = self._price_of_matrices(model.A.counts, round(GROWTH * model.num_rows))
            if model.price + more <= room:
                self._growth *= GROWTH
                model.enlarge(GROWTH)
                return None
        with_correction = self.config.second_order
        point = at(bent, graph=not with_correction)
        errors_here = math.nan
        best, newest, x = point, point, bent
        if with_correction and math.isfinite(point.loss):
            moved = point.outputs.detach().to(change.dtype) - before.outputs.detach().to(change.dtype)
            missing = before.folded(moved) - change
            errors_here = float(missing.norm() / change.norm().clamp(min=torch.finfo(change.dtype).tiny))
            correction = model.move(missing, damping, self.config.filter)
            if float(correction.norm()) <= MAX_BEND / 2 * float(d.norm()):
                bent = walk.x + d + correction
                newest = at(bent, graph=True)
                if newest.loss < point.loss:
                    best, x = newest, bent
        gain = before.loss - best.loss
        if not gain > 0:
            self.damping = min(self.damping * RAISE, MOST)
            return None
        if best is not newest or not best.outputs.requires_grad:  # a graph is of the weights that were evaluated last
            best = at(x, graph=True)
        errors.append(errors_here)
        if isinstance(model, Sampled) and errors_here < LINEAR:  # nothing but the sample keeps it from the end
            self._growth *= GROWTH_LINEAR
        walk.predicted += max(expected, 0.0)
        walk.time += 1 / max(damping, torch.finfo(torch.float64).tiny)
        factor = LOWER if gain >= POOR * expected else HOLD
        self.damping = max(self.damping * (LOWER_LINEAR if errors_here < LINEAR else factor), LEAST)
        return x, best

    def _move(self, material: Material, walk: _Walk, first: float, end: list[Tensor], spent: _Spent) -> Move:
        """What is proposed."""
        delta = displacement(material.parameters, self._movable, end)
        self._proposed = first, end
        rate = self._rate()
        steps = walk.time / rate if rate > 0 else walk.time
        horizon = int(min(max(steps, 1.0), self._longest))
        prediction = PhasePrediction(
            coefficients=torch.ones(1, 1, dtype=torch.float64),
            horizon=horizon,
            predicted_loss=walk.point.loss,
            loss_trajectory=((horizon, walk.point.loss),),
            predicted_reduction=0.0,
            max_scale=1.0,
        )
        return Move(
            prediction=prediction, delta=delta, num_forward=spent.forwards, num_backward=spent.backwards,
            num_matrix_forwards=spent.matrix_forwards,
        )  # fmt: skip

    # ---- what becomes of them ----------------------------------------------------------------------------

    def on_verdict(self, verdict: Verdict) -> None:
        """Remember weights that could not be improved on: real steps from there may only make them worse.

        Raises:
            ResidualError: the run's loss is another one than that of the residuals.
        """
        proposed, self._proposed = self._proposed, None
        if proposed is None:
            return
        first, end = proposed
        before = verdict.loss_before
        known, self._compared = self._compared, True  # later losses may be small enough to differ by rounding
        passes = SAME_LOSS * max(abs(before), abs(first)) + ROUNDING
        if not known and math.isfinite(before) and abs(before - first) > passes:
            whose = "the loss of output_fn" if isinstance(self._problem, Convex) else "the mean square of residual_fn"
            self._mismatch = f"{whose} is {first:.6g}, and the loss is {before:.6g}: they must be the same"
            raise ResidualError(self._mismatch)
        if self.stream.fresh:  # losses of different batches say nothing of which weights are better
            self._best = end if verdict.accepted else self._best
            return
        loss = verdict.loss_after if verdict.accepted else verdict.loss_before
        if math.isfinite(loss) and loss <= self._best_loss:
            self._best_loss = loss
            self._best = end if verdict.accepted else self._best

    def least_price(self, material: Material) -> float:
        """A few moves: matrices, products, and forwards; what they are made of is asked of the model."""
        self._prepare(material)
        assert self._linearizer is not None
        with isolated(material.model, "training" if material.exact else "quiet", reach=self._reach) as isolation:
            isolation.begin()
            point = self._at(material, graph=True)
            counts = self._linearizer.counted(point.outputs, point.cotangents)
        backwards = self._linearizer.num_backward(len(point.cotangents), counts.num_rows)
        more = (backwards - 1) * BACKWARD_UNITS / FORWARD_UNITS  # one is among the passes
        number = self._sample(counts, more)
        return TRIAL_MOVES * (LEAST_PASSES + more + self._price_of_matrices(counts, number))

    def know(self, best: list[Tensor], loss: float, *, stale: bool) -> None:
        """See :class:`Source`."""
        self._best, self._best_loss, self._best_is_stale = [t.clone() for t in best], loss, stale
        self._searching = self.searches

    @property
    def knows_better(self) -> bool:
        """Whether there are weights to come back to."""
        return self._best is not None

    def overwritten(self) -> None:
        """Weights from before are of no use any more."""
        self._best, self._best_loss, self._anchor = None, math.inf, None
        self._curvature, self._num_averaged = None, 0

    @property
    def regime(self) -> str:
        """Lazy, where the linear model holds over the moves that are made; else feature learning."""
        if math.isnan(self.linearity):
            return "unknown"
        return "lazy" if self.linearity < LAZY else "feature learning"

    # ---- state -------------------------------------------------------------------------------------------

    def state_dict(self) -> StateDict:
        """Damping, and the best weights."""
        return {
            "damping": self.damping, "linearity": self.linearity, "num_moves": self.num_moves,
            "best": None if self._best is None else [t.clone() for t in self._best], "best_loss": self._best_loss,
            "movable": list(self._movable), "needs_graph": self._needs_graph, "compared": self._compared,
            "mismatch": self._mismatch, "num_in_chain": self.num_in_chain, "best_is_stale": self._best_is_stale,
            "anchor": None if self._anchor is None else [t.clone() for t in self._anchor],
            "curvature": None if self._curvature is None else self._curvature.clone(),
            "searching": self._searching, "num_averaged": self._num_averaged, "stream": self.stream.state_dict(),
            "num_asked": self._num_asked, "price_of_move": self._price_of_move, "growth": self._growth,
        }  # fmt: skip

    def load_state_dict(self, state: StateDict) -> None:
        """Inverse of :meth:`state_dict`."""
        self.damping, self.linearity = state["damping"], state["linearity"]
        self.num_moves, self._best_loss = state["num_moves"], state["best_loss"]
        self._best = None if state["best"] is None else [t.clone() for t in state["best"]]
        self._movable = [bool(v) for v in state["movable"]]
        self._needs_graph, self._compared = state["needs_graph"], state["compared"]
        self._mismatch, self.num_in_chain = state["mismatch"], state["num_in_chain"]
        self._best_is_stale, self._num_asked = state["best_is_stale"], state["num_asked"]
        self._anchor = None if state["anchor"] is None else [t.clone() for t in state["anchor"]]
        self._curvature = None if state["curvature"] is None else state["curvature"].clone()
        self._num_averaged = state["num_averaged"]
        self._searching = state["searching"]
        self._price_of_move = state.get("price_of_move", 0.0)  # states of before it was held have none
        self._growth = state.get("growth", 1.0)
        self.stream.load_state_dict(state["stream"])
        self._linearizer, self._proposed = None, None


def _half(v: Tensor) -> float:
    return 0.5 * float(v @ v)
