"""How a proposal, a raise or a whole run is judged.

Reading order: `gate` (accept or refuse), `exactness` (are losses exact), `evaluation` (losses that leave no trace),
`probation` (a jump on trial), `ledger` (what jumps were worth), `switchback` (the lookahead's trial), `guard` (a run
that stands above its best), `validation` (the user's own measure).
"""
