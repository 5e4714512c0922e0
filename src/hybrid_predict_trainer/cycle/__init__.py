"""How one step goes.

Reading order: `state` (all that a run remembers), `phases` (which phase may follow which), `learning` (what the
controller looks at; what a step teaches), `real_step` and `transaction` (a phase's step), `alarms` (what an alarm makes
of a run), `withdrawal` (back to a state from before), `outside` (weights that somebody else wrote), `passes` (rounds
over a loader).
"""

from ..former_names import lookup

__getattr__ = lookup("cycle")
