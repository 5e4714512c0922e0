"""What is proposed: nothing here is applied.

Reading order: `proposal` (ask, correct, check), `corrector` and `residuals` (what similar predictions got wrong),
`horizon` (how far), `confidence` (probability that a jump is kept), `feedback` (outcomes taught), `time_budget`.
"""
