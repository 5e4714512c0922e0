"""Streams of tensors -> small summaries with constant memory.

* :class:`StreamingPca`: principal directions of a stream of vectors (incremental SVD, Ross et al. 2008).
* :class:`LowRankFactors`: rank r of a stream of matrices by one warm-started power iteration each, what
  was left out fed back into the next (PowerSGD, arXiv 1905.13727, algorithm 1).
* :func:`sketch_tensors`: count sketch of a list of tensors, tensor by tensor (Charikar et al. 2002), and
  :class:`CountSketch`, the same from a fixed sample of the numbers with its hashes kept.

Letters: ``P`` numbers of a vector, ``D`` kept dimensions, ``B`` vectors of a block, ``S`` sketch size,
``R`` rank, ``m x n`` a matrix.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..records import StateDict
from ..weights import algebra as weights

#: Dimensions of the sketch of a displacement in the encoded state.
SKETCH_SIZE = 100
# Multipliers of the hash; odd 64-bit constants of splitmix64 and MurmurHash3.
_MIX = (0x1E3779B97F4A7C15, 0x3F58476D1CE4E5B9, 0x14D049BB133111EB)
_CHUNK = 1 << 20  # numbers hashed at a time, so that the hashes of a large tensor are never held at once


def _hash(index: Tensor, seed: int) -> Tensor:
    """Pseudo-random non-negative 62-bit integers from integers, the same on every machine."""
    x = index + (seed + 1) * 0x2545F4914F6CDD1D % (1 << 62)
    for multiplier, shift in zip(_MIX, (30, 27, 31), strict=True):
        x = (x ^ (x >> shift)) * multiplier
    return (x ^ (x >> 31)) & ((1 << 62) - 1)


@torch.no_grad()
def sketch_tensors(tensors: Sequence[Tensor], size: int = SKETCH_SIZE, *, seed: int = 0) -> Tensor:
    """(S,) count sketch: every number is added to one of S bins with a random sign.

    Inner products of sketches are unbiased estimates of inner products, with variance at most
    (|a|^2 |b|^2 + (a.b)^2) / S.  Bins and signs are hashes of the position, so no table is kept, and two
    sketches of equally shaped tensors with the same seed are comparable.
    """
    bins = torch.zeros(size, dtype=torch.float64)
    offset = 0
    for tensor in tensors:
        flat = tensor.detach().reshape(-1)
        for piece in flat.split(_CHUNK):
            hashed = _hash(torch.arange(offset, offset + len(piece), device=flat.device), seed)
            offset += len(piece)
            signed = piece.float() * (2 * (hashed >> 40 & 1) - 1)
            own = torch.zeros(size, dtype=torch.float32, device=flat.device)
            bins += own.index_add_(0, hashed % size, signed).cpu().double()
    return bins


class CountSketch:
    """Count sketch of tensors of fixed shapes from a fixed sample of their numbers.

    Reading 10 million numbers once takes several milliseconds on one core, and hashing their positions
    ten times that.  Eight thousand of them, taken at equal distances in every tensor and weighted by
    that distance, add an error of 1 / sqrt(8192) to inner products where the sketch itself has one of
    1 / sqrt(S).  Tensors with fewer numbers in all are sketched whole.
    """

    def __init__(
        self, shapes: Sequence[torch.Size | tuple[int, ...]], size: int = SKETCH_SIZE, *,
        max_numbers: int = 1 << 13, seed: int = 0,
    ) -> None:  # fmt: skip
        """Choose the sample, hash its positions.

        Args:
            shapes: Of the tensors, in the order they will come.
            size: S.
            max_numbers: Size of the sample, about.
            seed: Of bins and signs.
        """
        self.size = size
        counts = [math.prod(shape) for shape in shapes]
        wanted = max(1, math.ceil(sum(counts) / max_numbers))
        self._slices: list[slice] = []
        positions, weights, start = [], [], 0
        for shape, count in zip(shapes, counts, strict=True):
            stride = _coprime(min(wanted, max(count, 1)), shape[-1] if len(shape) else 1)
            first = int(_hash(torch.tensor([start]), seed)) % stride % max(count, 1)
            self._slices.append(slice(first, None, stride))
            own = torch.arange(first, count, stride)
            positions.append(start + own)
            weights.append(torch.full((len(own),), math.sqrt(count / max(len(own), 1))))
            start += count
        hashed = _hash(torch.cat(positions), seed)
        self._bins = hashed % size  # (sample,)
        self._signs = (2 * (hashed >> 40 & 1) - 1) * torch.cat(weights)  # (sample,)

    @torch.no_grad()
    def __call__(self, flat: Sequence[Tensor]) -> Tensor:
        """(S,) float32 on the CPU, of one flat tensor (P,) per shape."""
        device = flat[0].device
        sample = torch.cat([t[own].to(device) for t, own in zip(flat, self._slices, strict=True)]).float().cpu()
        # added up on the host: the sample is small, and CUDA adds in another order every time
        return torch.zeros(self.size).index_add_(0, self._bins, sample * self._signs)

    def memory_bytes(self) -> int:
        """Bytes of bins and signs."""
        return self._bins.numel() * self._bins.element_size() + self._signs.numel() * self._signs.element_size()


def _coprime(stride: int, length: int) -> int:
    """Smallest number from ``stride`` on that shares no factor with a row length: no column is left out."""
    while math.gcd(stride, length) > 1:
        stride += 1
    return stride


class StreamingPca:
    """Mean and leading principal directions of a stream of vectors, block by block.

    Like scikit-learn's ``IncrementalPCA``: the singular values times directions so far, the new block and
    one row that corrects the mean are decomposed together.

    Directions turn and change sign from block to block.  What learns from the coordinates needs them to
    stay what they were: :meth:`coordinates` are those of :meth:`transform` turned so that they move as
    little as possible (orthogonal Procrustes, Schoenemann 1966).
    """

    def __init__(self, num_dimensions: int) -> None:
        """Args: num_dimensions: D."""
        self.num_dimensions = num_dimensions
        self.count = 0
        self.mean = torch.zeros(0, dtype=torch.float64)
        self.singular_values = torch.zeros(0, dtype=torch.float64)  # (<= D,)
        self.directions = torch.zeros(0, 0, dtype=torch.float64)  # (<= D, P) orthonormal rows
        self.rotation = torch.zeros(num_dimensions, 0, dtype=torch.float64)  # (D, <= D) orthonormal columns
        self.error = 0.0  # relative squared reconstruction error of the newest block, before it was learnt

    @torch.no_grad()
    def observe(self, block: Tensor) -> None:
        """Add B vectors (B, P)."""
        block = block.detach().double().cpu()
        size, mean = len(block), block.mean(dim=0)
        if not self.count:
            stacked = block - mean
            self.mean = mean
        else:
            self.error = self.reconstruction_error(block)
            total = self.count + size
            correction = (self.count * size / total) ** 0.5 * (self.mean - mean)
            kept = self.singular_values[:, None] * self.directions
            stacked = torch.cat([kept, block - mean, correction[None]])
            self.mean = self.mean + (size / total) * (mean - self.mean)
        self.count += size
        values, rows = _right_vectors(stacked, self.num_dimensions)
        seen = self.rotation @ self.directions @ rows.mT if self.directions.numel() else None
        self.rotation = _turned(seen, self.num_dimensions, len(rows))
        self.singular_values, self.directions = values, rows

    def transform(self, vectors: Tensor) -> Tensor:
        """(..., P) -> (..., D) latent coordinates."""
        return (vectors.double() - self.mean) @ self.directions.mT

    def coordinates(self, vectors: Tensor) -> Tensor:
        """(..., P) -> (..., D) latent coordinates that keep their meaning; zeros before the first block."""
        if not self.count:
            return torch.zeros(*vectors.shape[:-1], self.num_dimensions, dtype=torch.float64)
        return self.transform(vectors) @ self.rotation.mT

    def reconstruct(self, latent: Tensor) -> Tensor:
        """(..., D) -> (..., P)."""
        return latent @ self.directions + self.mean

    def reconstruction_error(self, vectors: Tensor) -> float:
        """|x - reconstruction|^2 / |x - mean|^2 summed over vectors (B, P)."""
        centred = vectors.double() - self.mean
        total = float(centred.square().sum())
        left = total - float((centred @ self.directions.mT).square().sum())
        return max(left, 0.0) / total if total > 0 else 0.0

    @property
    def explained_variance(self) -> Tensor:
        """(<= D,) along every direction."""
        return self.singular_values.square() / max(self.count - 1, 1)

    def memory_bytes(self) -> int:
        """Bytes held between blocks."""
        held = (self.mean, self.singular_values, self.directions, self.rotation)
        return 8 * sum(t.numel() for t in held)

    def state_dict(self) -> StateDict:
        """Everything learnt."""
        return {
            "count": self.count, "mean": self.mean, "singular_values": self.singular_values,
            "directions": self.directions, "rotation": self.rotation, "error": self.error,
        }  # fmt: skip

    def load_state_dict(self, state: StateDict) -> None:
        """Inverse of :meth:`state_dict`."""
        self.count, self.error = state["count"], state["error"]
        self.mean, self.directions = state["mean"].clone(), state["directions"].clone()
        self.singular_values, self.rotation = state["singular_values"].clone(), state["rotation"].clone()


def _right_vectors(rows: Tensor, limit: int) -> tuple[Tensor, Tensor]:
    """Leading singular values (<= limit,) and right vectors (<= limit, P) of (B, P)."""
    _, values, vectors = torch.linalg.svd(rows, full_matrices=False)
    keep = min(limit, int((values > 1e-12 * values[:1].clamp(min=1e-300)).sum()))
    return values[:keep], vectors[:keep]


def _turned(seen: Tensor | None, size: int, kept: int) -> Tensor:
    """(D, kept) orthonormal columns nearest to the old coordinates of the new directions; unit ones at first."""
    if seen is None:
        return torch.eye(size, kept, dtype=torch.float64)
    U, _, V = torch.linalg.svd(seen, full_matrices=False)
    turned: Tensor = U @ V
    return turned


class LowRankFactors:
    """Rank-R factors of a stream of matrices, one power iteration per matrix.

    For every matrix M (the displacement of one weight, plus what the last approximation left):
    P = orthonormal basis of M Q, Q = M' P, approximation P Q'.  Q starts the next iteration, so on a
    slowly turning stream one iteration per matrix is enough; what is left out is not lost but comes
    again (error feedback).  Tensors with more than two dimensions are read as (first, rest).
    """

    def __init__(self, rank: int = 4, *, feedback: bool = True, seed: int = 0) -> None:
        """Args: rank: R.  feedback: add what was left out to the next matrix.  seed: of the first Q."""
        self.rank, self.feedback = rank, feedback
        self._generator = torch.Generator().manual_seed(seed)
        self._Q: list[Tensor] = []
        self._error: list[Tensor] = []

    @torch.no_grad()
    def observe(self, tensors: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """One displacement per weight -> (P (m, R), Q (n, R)) per weight, with P Q' the approximation.

        Vectors are kept whole: P is the vector as a column, Q is 1.
        """
        if not self._Q:
            self._begin(tensors)
        factors = []
        for i, tensor in enumerate(tensors):
            M = tensor.detach().float().reshape(len(tensor), -1) if tensor.dim() > 1 else tensor.float().reshape(-1, 1)
            if self.feedback:
                M = M + self._error[i].to(M.device)  # in host memory after a resume
            P, Q = power_iteration(M, self._Q[i].to(M.device))
            self._Q[i] = Q
            if self.feedback:
                self._error[i] = M - P @ Q.mT
            factors.append((P, Q))
        return factors

    def _begin(self, tensors: Sequence[Tensor]) -> None:
        """First factors, of all tensors or, where that is interrupted, of none."""
        starts, errors = [], []
        for tensor in tensors:
            m, n = (len(tensor), tensor[0].numel()) if tensor.dim() > 1 else (len(tensor), 1)
            start = torch.randn(n, min(self.rank, m, n), generator=self._generator).to(tensor.device)
            starts.append(torch.linalg.qr(start)[0])
            errors.append(torch.zeros((m, n) if self.feedback else (0,), device=tensor.device))
        self._error = errors
        self._Q = starts  # the last: whoever has these has begun

    @torch.no_grad()
    def energies(self) -> Tensor:
        """(tensors, R + 1) float64: squared lengths along the R directions, longest first, and of what they leave out.

        P is orthonormal, so the squared lengths of the columns of Q and of the rest add up to that of the
        matrix.  Without feedback the rest is not kept and 0.
        """
        rows = []
        for Q, error in zip(self._Q, self._error, strict=True):
            lengths = Q.square().sum(dim=0).sort(descending=True).values
            padded = torch.nn.functional.pad(lengths, (0, self.rank - len(lengths)))
            rows.append(torch.cat([padded, error.square().sum().reshape(1)]))
        return weights.on_host(rows) if rows else torch.zeros(0, self.rank + 1, dtype=torch.float64)

    def memory_bytes(self) -> int:
        """Factors, and one more copy of the weights if there is feedback."""
        return sum(t.numel() * t.element_size() for t in (*self._Q, *self._error))

    def state_dict(self) -> StateDict:
        """Warm starts and what was left out."""
        return {"Q": list(self._Q), "error": list(self._error), "generator": self._generator.get_state()}

    def load_state_dict(self, state: StateDict) -> None:
        """Inverse of :meth:`state_dict`."""
        self._Q, self._error = [t.clone() for t in state["Q"]], [t.clone() for t in state["error"]]
        self._generator.set_state(state["generator"])


def power_iteration(M: Tensor, Q: Tensor) -> tuple[Tensor, Tensor]:
    """One step of subspace iteration from a warm start.

    Args:
        M: (m, n).
        Q: (n, R) last right factor, any scale; zero columns are harmless.

    Returns:
        P (m, R) orthonormal and Q = M'P (n, R): the best approximation of M in span(P) is P Q'.
    """
    P, _ = torch.linalg.qr(M @ Q)
    return P, M.mT @ P
