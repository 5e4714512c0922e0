"""A recipe: step sizes per role of parameters, as multiples of the schedule's rate.

One learning rate for a whole network is rarely the best one.  In a language model with untrained blocks most of the
loss that plain AdamW leaves behind hangs on the head's rate, then on queries and keys, then on the embedding (LOG.md).
A :class:`Recipe` is a table of such factors that can be applied in a run (:class:`.role_rates.RoleRates`), written
down, and taken home into a plain script as parameter groups.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from ..records import ConfigError
from ..safe_files import UnusableFileError, read_text, write_text
from ..weights.parameters import Groups, predicted_parameters
from ..weights.real_views import owner

#: Roles that a matrix with queries, keys and values in one is cut into, by thirds.
FUSED, FUSED_PARTS = "attention_qkv", ("attention_q", "attention_k", "attention_v")
#: No recipe is longer.
MAX_BYTES = 1_000_000
#: The factor of a table of embeddings is raised no further than this where its steps would be too short.
MOST_FOR_TABLE = 16.0
#: A factor beyond these is a mistake.
LEAST, MOST = 1e-4, 1e4


@dataclass(frozen=True, slots=True)
class TableStep:
    """How the factor of a table of embeddings hangs on the largest rate of a schedule.

    Attributes:
        least: The prior's factor.
        length: Rate times factor that the table is to have at the peak of the schedule at least, in units of its
            weights.
        most: And at most; it may take the factor below the prior's, to 1.
    """

    least: float
    length: float
    most: float = math.inf

    def factor(self, peak: float) -> float:
        """Factor where the largest rate is ``peak``, above 0; to three digits."""
        wanted = max(self.least, float(f"{min(self.length / peak, MOST_FOR_TABLE):.3g}"))
        return min(wanted, max(1.0, float(f"{self.most / peak:.3g}")))


@dataclass(frozen=True, slots=True)
class Recipe:
    """Multiples of the schedule's learning rate, by role.

    Attributes:
        rates: Role (:data:`.weights.parameters.ROLES`, or one of the user's own) -> factor, dimensionless; a role
            that is not named has factor 1.
        origin: Where the numbers are from, in a sentence.
        multiplier: What all of them were multiplied by at the end of the run that found them.
        table: What the embedding's factor hangs on, for a run whose rate rises above the peak that it was chosen for;
            None: it is the prior's at any rate, or from a file.
    """

    rates: Mapping[str, float] = field(default_factory=dict)
    origin: str = "by hand"
    multiplier: float = 1.0
    table: TableStep | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            ConfigError: a factor is no positive number.
        """
        for role, rate in {**self.rates, "multiplier": self.multiplier}.items():
            number = isinstance(rate, int | float) and not isinstance(rate, bool)
            if not number or not LEAST <= rate <= MOST:  # nor one that is not a number
                huge = isinstance(rate, int) and abs(rate) > MOST  # thousands of digits cannot even be printed
                said = "a whole number" if huge else repr(rate)
                raise ConfigError(f"recipe: {role} = {said} must be a number in [{LEAST:g}, {MOST:g}]")

    @property
    def empty(self) -> bool:
        """Whether every role keeps the schedule's rate."""
        return all(rate == 1.0 for rate in self.rates.values())

    def rate_of(self, role: str) -> float:
        """Factor of a role."""
        return float(self.rates.get(role, 1.0))

    def parts_of(self, parameter: Tensor, role: str) -> list[tuple[Any, float]]:
        """Slices of a parameter of a role and their factors; one slice where the whole has the same.

        A matrix that holds queries, keys and values is cut by thirds of the side that is three times the other.
        """
        if role == FUSED and role not in self.rates:
            cuts = thirds(parameter)
            if cuts:
                return [(cut, self.rate_of(part)) for cut, part in zip(cuts, FUSED_PARTS, strict=True)]
        return [(..., self.rate_of(role))]

    def param_groups(
        self, model: nn.Module, lr: float, *, weight_decay: float = 0.0, roles: dict[str, str] | None = None,
        groups: Iterable[Mapping[str, Any]] | None = None,
    ) -> list[dict[str, Any]]:  # fmt: skip
        """Parameter groups for an optimizer of one's own: ``AdamW(recipe.param_groups(model, 3e-3))``.

        Decoupled weight decay is multiplied by the rate in AdamW, so that it is divided by factor and multiplier here:
        what pulls the weights back stays what ``lr`` and ``weight_decay`` say, as in a run of ours.  A fused matrix of
        queries, keys and values cannot be cut into groups: it has the factor of its values.

        Args:
            model: Its parameters that require a gradient are grouped.
            lr: Rate of factor 1.
            weight_decay: The same for all parameters at factor 1.
            roles: Overrides, as for :class:`.HybridTrainer`.
            groups: One's own instead, say with decay and without, as an optimizer takes them: each is split by factor
                and keeps what else it says; a rate and a decay of its own are those at factor 1.

        Raises:
            ConfigError: nothing trains, or a group has no ``params``.
        """
        own = _own_groups(model, weight_decay) if groups is None else [dict(group) for group in groups]
        if not all("params" in group for group in own):
            raise ConfigError("recipe: a group is a dictionary with 'params', as an optimizer takes it")
        for group in own:
            held = [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"])
            group["params"] = [p for p in held if _tensor(p).requires_grad]
        found = [_tensor(p) for group in own for p in group["params"]]
        if not found:
            raise ConfigError("recipe: the model has no parameter that requires a gradient")
        parameters, named = predicted_parameters(model, _Holder(found), roles)  # type: ignore[arg-type]
        factors: dict[int, float] = {}
        for parameter, row in zip(parameters, named.index, strict=True):
            role = named.roles[row]
            name = FUSED_PARTS[2] if role == FUSED and role not in self.rates else role
            factors[id(owner(parameter))] = self.rate_of(name)
        return [part for group in own for part in self._split(group, factors, lr, weight_decay)]

    def _split(
        self, group: Mapping[str, Any], factors: Mapping[int, float], lr: float, weight_decay: float
    ) -> list[dict[str, Any]]:
        by_factor: dict[float, list[Any]] = {}
        for parameter in group["params"]:
            by_factor.setdefault(factors.get(id(_tensor(parameter)), 1.0), []).append(parameter)
        rate, decay = group.get("lr", lr), group.get("weight_decay", weight_decay)
        return [
            {
                **group,
                "params": held,
                "lr": rate * self.multiplier * factor,
                "weight_decay": decay / (factor * self.multiplier),
                "rate_factor": factor,
            }
            for factor, held in sorted(by_factor.items())
        ]

    def peak_rates(self, lr: float) -> dict[str, float]:
        """Learning rate by role where that of the schedule is ``lr``, multiplier included; "others": of further roles.

        Args:
            lr: Of the schedule: what ``get_last_lr`` shows.
        """
        total = lr * self.multiplier
        return {role: total * self.rate_of(role) for role in self.rates} | {"others": total}

    def lines(self) -> str:
        """The recipe as a TOML file."""
        head = [f'origin = "{_escaped(self.origin)}"', f"multiplier = {_number(self.multiplier)}", "", "[rates]"]
        rows = [f'"{_escaped(role)}" = {_number(rate)}' for role, rate in self.rates.items()]
        return "\n".join([*head, *rows]) + "\n"

    def save(self, path: str | Path) -> Path:
        """Write :meth:`lines` to ``path``, which is whole or not there, and is returned."""
        write_text(path, self.lines())
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> Recipe:
        """Read what :meth:`save` wrote to ``path``.

        Raises:
            ConfigError: there is no such file, or it holds something else.
        """
        try:
            found = tomllib.loads(read_text(path, MAX_BYTES))
        except UnusableFileError as error:
            raise ConfigError(f"recipe {error}") from error
        except ValueError as error:  # of the file, its text or a number of thousands of digits
            raise ConfigError(f"recipe {path}: is not TOML ({error})") from error
        unknown = sorted(set(found) - {"origin", "multiplier", "rates"})
        if unknown:
            raise ConfigError(f"recipe {path}: unknown key {unknown[0]!r}; it holds origin, multiplier and [rates]")
        rates, origin = found.get("rates", {}), found.get("origin", str(path))
        if not isinstance(rates, dict) or not isinstance(origin, str):
            raise ConfigError(f"recipe {path}: [rates] must be a table of numbers, and origin a sentence")
        return cls(rates, origin, found.get("multiplier", 1.0))


def _own_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    return [{"params": list(model.parameters()), "weight_decay": weight_decay}]


def _tensor(held: Any) -> Tensor:
    """A parameter of a group, which may be a pair of its name and itself."""
    return held[1] if isinstance(held, tuple) else held  # type: ignore[no-any-return]


class _Holder:
    """Parameters in the shape of an optimizer."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.param_groups = [{"params": parameters}]


def roles_in(groups: Groups) -> set[str]:
    """Roles that a recipe may name in a network: those of its groups, and the parts of what is fused."""
    return set(groups.roles) | (set(FUSED_PARTS) if FUSED in groups.roles else set())


def thirds(parameter: Tensor) -> list[Any]:
    """Slices of queries, keys and values of a fused matrix or bias; none where its shape does not tell."""
    shape = tuple(parameter.shape)
    if len(shape) == 2 and shape[0] == 3 * shape[1]:
        side, size = 0, shape[1]
    elif len(shape) == 2 and shape[1] == 3 * shape[0]:
        side, size = 1, shape[0]
    else:
        return []
    at = [slice(k * size, (k + 1) * size) for k in range(3)]
    return [(cut,) if side == 0 else (slice(None), cut) for cut in at]


def _number(value: float) -> str:
    """Short where that is the whole number: what is read again is what was written."""
    short = f"{value:.6g}"
    return short if float(short) == value else repr(float(value))


def _escaped(text: str) -> str:
    """In a TOML string, which holds no quotes, backslashes and control characters as they are."""
    plain = text.replace("\\", "\\\\").replace('"', '\\"')
    return "".join(f"\\u{ord(c):04X}" if ord(c) < 32 or ord(c) == 127 else c for c in plain)


#: Optimizers that take weight decay out of the weights and not into the gradient, by a part of their names.
DECOUPLED = ("adamw", "muon", "adafactor", "lion")


def decay_of(optimizer: Optimizer, group: Mapping[str, Any]) -> float:
    """Decoupled weight decay of a group's step per unit of rate; 0 where the gradient has it, or there is none.

    A group of torch's, or of pytorch_optimizer's, says which of both it is; of the others the name does.
    """
    decay = group.get("weight_decay", 0.0)
    if not decay or not isinstance(decay, int | float) or group.get("fixed_decay"):  # which no rate multiplies
        return 0.0
    said = group.get("decoupled_weight_decay", group.get("weight_decouple"))
    if said is None:
        said = any(part in kind.__name__.lower() for kind in type(optimizer).__mro__ for part in DECOUPLED)
    return float(decay) if said else 0.0
