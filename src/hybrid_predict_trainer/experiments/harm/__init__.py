"""``hpt bench harm``: ordinary training that no constant was chosen on, with and without the trainer.

Reading order: `settings` (the table of what is trained), `data`, `problems`, `models`, `runs` (one run of one arm),
`store`, `table` (the bar and the verdicts), `program` (all runs, in processes, resumable).
"""
