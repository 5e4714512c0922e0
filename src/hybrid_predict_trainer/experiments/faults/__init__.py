"""Faults that are put to the product, and what becomes of them: ``hpt bench faults``, docs/reliability.md.

Reading order: :mod:`.table` (cases, tries, the rows), :mod:`.material` (a small model, its plain loop, a predictor with
a fault), then the cases: :mod:`.training` (numbers and predictors), :mod:`.surroundings` (data, optimizer, clock),
:mod:`.files` (checkpoints) and :mod:`.processes` (kills, signals, disks).
"""
