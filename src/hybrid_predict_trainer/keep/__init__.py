"""What is kept: exact copies in memory, checkpoints on disk.

Reading order, in memory: `rng`, `buffers`, `object_state`, `optimizer_state`, `model_state` (what a state is made of),
`snapshot` (all of it), `isolation` (undo what a forward did).  On disk: `plain_values` and `state_tree` (what can be
written), `manifest`, `checkpoint` (atomic commit), `schema`, `migration` and `identity` (what may be loaded),
`resume` (a run to disk and back).
"""
