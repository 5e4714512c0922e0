"""Which trials of a hyper-parameter search cannot win any more.

Reading order: `curves` (a trial as it is seen), `ends` (their ends, foretold from where they stand), `joint` (from
parameters and all looks at once), `looks` (confidence over many looks), `decide` (who is pruned, who goes on), `pruner`
(all of it behind Optuna's interface).
"""
