"""How numbers for every weight lie in memory: one tensor per parameter, or one vector for all of a small model.

Only memory of this library is laid out so: the parameters themselves stay the tensors that they are, and are read by
one call for all of them.

Shape letters: ``P`` weights of one vector.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .algebra import Tensors, Together
from .products import squared_norms


class Layout:
    """Lists of vectors, and the same numbers as lists of one tensor per parameter.

    Attributes:
        flat: All weights lie in one vector, parameter after parameter.
        sizes: P of every vector.
        dtypes, devices: Of every vector.
    """

    def __init__(
        self, parameters: Sequence[Tensor], dtypes: Sequence[torch.dtype], devices: Sequence[torch.device], *,
        flat: bool,
    ) -> None:  # fmt: skip
        """Describe the memory; none is taken.

        Args:
            parameters: Whose shapes are laid out.
            dtypes: Of the numbers kept for each of them.
            devices: Where these are.
            flat: In one vector, if all are of one dtype and on one device.
        """
        self._like = [p.detach() for p in parameters]  # for their shapes
        self._lengths = [p.numel() for p in parameters]
        self.flat = flat and len(parameters) > 1 and len({*zip(dtypes, devices, strict=True)}) == 1
        self.sizes = [sum(self._lengths)] if self.flat else self._lengths
        self.dtypes, self.devices = (list(dtypes), list(devices)) if not self.flat else ([dtypes[0]], [devices[0]])
        self._lengths_there = torch.tensor(self._lengths, dtype=torch.int64, device=self.devices[0])
        self._known: dict[int, tuple[Tensor, Sequence[Tensor]]] = {}  # views of vectors that live on, by id

    @property
    def in_one_place(self) -> bool:
        """Whether all numbers are in one vector in host memory."""
        return self.flat and self.devices[0].type == "cpu"

    def zeros(self) -> Tensors:
        """New vectors."""
        shapes = [(self.sizes[0],)] if self.flat else [p.shape for p in self._like]
        return [
            torch.zeros(shape, dtype=dtype, device=device)
            for shape, dtype, device in zip(shapes, self.dtypes, self.devices, strict=True)
        ]

    def split(self, vectors: Tensors) -> Sequence[Tensor]:
        """One view per parameter, shaped like it."""
        if not self.flat or not vectors:
            return vectors
        return Together(vectors[0], self._like, self._lengths)

    def views(self, vectors: Tensors) -> Sequence[Tensor]:
        """As :meth:`split`, of a few vectors that are asked for again and again."""
        if not self.flat or not vectors:
            return vectors
        vector = vectors[0]
        known = self._known.get(id(vector))
        if known is None or known[0] is not vector:
            if len(self._known) > 4:
                self._known.clear()
            known = self._known[id(vector)] = vector, self.split(vectors)
        return known[1]

    def joined(self, tensors: Sequence[Tensor]) -> Tensors:
        """One tensor per parameter -> vectors of the layout's dtype, on its devices; copies where they differ."""
        if self.flat:
            return [self.gathered(tensors).to(self.devices[0], self.dtypes[0])]
        return [
            t.detach().to(device=device, dtype=dtype)
            for t, dtype, device in zip(tensors, self.dtypes, self.devices, strict=True)
        ]

    def squared_norms(self, vectors: Tensors) -> Tensor:
        """(number of parameters,) squared Euclidean norms in float64 on the CPU."""
        if not self.flat:
            return squared_norms(vectors)
        found = torch.segment_reduce(vectors[0].square(), "sum", lengths=self._lengths_there, unsafe=True)
        return found.cpu().double()

    def gathered(self, tensors: Sequence[Tensor]) -> Tensor:
        """One vector of the tensors' own dtype: a copy unless they lie in one."""
        if isinstance(tensors, Together):
            return tensors.vector
        plain = [t.detach() for t in tensors] if torch.is_grad_enabled() else list(tensors)
        vector: Tensor = torch._C._nn.flatten_dense_tensors(plain)
        return vector

    def joined_rows(self, matrices: Sequence[Tensor], dtypes: Sequence[torch.dtype]) -> Tensors:
        """One (K, P) matrix per parameter -> one per vector, as copies."""
        if not matrices:
            return []
        if self.flat:
            return [torch.cat([m.to(self.devices[0]) for m in matrices], dim=1).to(dtypes[0])]
        return [m.to(device, copy=True) for m, device in zip(matrices, self.devices, strict=True)]

    def split_rows(self, matrices: Tensors) -> Tensors:
        """Inverse of :meth:`joined_rows`."""
        if not self.flat or not matrices:
            return list(matrices)
        return [piece.contiguous() for piece in matrices[0].split(self._lengths, dim=1)]
