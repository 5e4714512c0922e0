"""What moves weights, or the rate that they move with.

Reading order: `lr_multiplier` (a learned multiple of the optimizer's steps) with `multiplier`, `edge_test` and
`unit_multiplier`; `group_warmup` (shorter first steps, group by group); `lookahead` (slow drift carried on);
`schedule` (the user's scheduler on the run's clock); `overflow` (a gradient scaler's search); `optimizer_memory`
(optimizers that only themselves may move weights).
"""
