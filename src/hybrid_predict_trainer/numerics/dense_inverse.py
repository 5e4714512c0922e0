"""A dense inverse Hessian approximation: BFGS, self-scaled BFGS, and a self-scaled member of Broyden's family.

Before each update H is divided by tau, so that all of it grows where the loss curves less than it believes (Oren &
Luenberger 1974; Al-Baali, Computational Optimization and Applications 9, 1998).  ``ssbroyden`` chooses the member of
the family with it, which on losses of differential equations ends lower than BFGS does (Urban, Stefanou & Pons, J.
Comput. Phys. 523, 2025, section 2.3).

Letters: ``P`` weights, s displacement, y difference of gradients; b = s'B s / s'y with B = H^-1, h = y'H y / s'y.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from ..records import StateDict

Update = Literal["bfgs", "ssbfgs", "ssbroyden"]

#: s'y has to exceed this share of |s| |y|.
MIN_CURVATURE = 1e-14


def broyden_scaling(b: float, h: float, n: int) -> tuple[float, float]:
    """tau and phi of a self-scaled Broyden update (Al-Baali 1998), from b and h; (1, 1) where they are not finite.

    Args:
        b: s'Bs / s'y, > 0.
        h: y'Hy / s'y, > 0.
        n: P.
    """
    a = max(b * h - 1, 1e-300)
    c = math.sqrt(a / (1 + a))
    rho = min(1.0, h * (1 - c))
    theta = max((rho - 1) / a, min(1 / max(rho, 1e-300), (1 - b) / b))
    sigma = 1 + a * theta
    smallest = abs(sigma) ** (1 / (1 - n)) if sigma != 0 and n > 1 else 1.0
    tau = min(1.0, 1 / b)
    tau = tau * min(smallest, 1 / theta) if theta > 0 else min(tau * smallest, sigma)
    phi = (1 - theta) / sigma if sigma != 0 else 1.0
    return (tau, phi) if math.isfinite(tau) and tau > 0 and math.isfinite(phi) else (1.0, 1.0)


class DenseInverse:
    """H (P, P) with its product with the present gradient.

    Attributes:
        Hg: (P,).
        first: Nothing was learnt since H was the unit matrix.
    """

    def __init__(self, g: Tensor, update: Update) -> None:
        """The unit matrix.

        Args:
            g: (P,) present gradient; tells type and device.
            update: Which one.
        """
        self._update = update
        self.H = torch.eye(len(g), dtype=g.dtype, device=g.device)
        self.Hg, self.first = g.clone(), True

    def forget(self, g: Tensor) -> None:
        """The unit matrix again, at a gradient."""
        self.H.zero_().fill_diagonal_(1.0)
        self.Hg, self.first = g.clone(), True

    def see(self, g: Tensor) -> None:
        """Another gradient, without a step that led to it."""
        self.Hg = g.clone() if self.first else self.H @ g

    def learn(self, s: Tensor, y: Tensor, before: Tensor, after: Tensor, t: float) -> None:
        """Take a pair; one without positive curvature changes nothing.

        Args:
            s: (P,) t times -Hg.
            y: (P,) after - before.
            before: (P,) gradient where s began.
            after: (P,) gradient where it ended.
            t: Multiple of the step that was taken.
        """
        s_y, q = float(s @ y), after.clone() if self.first else self.H @ after
        if s_y > MIN_CURVATURE * float(s.norm() * y.norm()):
            b = 1.0 if self.first else -t * float(s @ before) / s_y
            if self.first:
                scale = s_y / float(y @ y)
                self.H.mul_(scale)
                q, self.Hg, self.first = q * scale, self.Hg * scale, False
            Hy = q - self.Hg
            y_Hy = float(y @ Hy)
            if y_Hy > 0:
                tau, phi = self._scaling(b, y_Hy / s_y)
                v = math.sqrt(y_Hy) * (s / s_y - Hy / y_Hy)
                U = torch.stack([-Hy / (y_Hy * tau), v * (phi / tau), s / s_y], 1)
                V = torch.stack([Hy, v, s])
                q = q / tau + U @ (V @ after)
                self.H.addmm_(U, V, beta=1 / tau, alpha=1.0)
        self.Hg = q

    def _scaling(self, b: float, h: float) -> tuple[float, float]:
        if self._update == "bfgs" or not b > 0:
            return 1.0, 1.0
        if self._update == "ssbroyden":
            return broyden_scaling(b, h, len(self.Hg))
        return min(1.0, 1 / b), 1.0

    def memory_bytes(self) -> int:
        """Of H."""
        return self.H.numel() * self.H.element_size()

    def state_dict(self) -> StateDict:
        """Tensors."""
        return {"H": self.H.clone(), "Hg": self.Hg.clone(), "first": self.first}

    def load_state_dict(self, state: StateDict) -> None:
        """Inverse of :meth:`state_dict`."""
        self.H, self.Hg, self.first = state["H"].clone(), state["Hg"].clone(), state["first"]
