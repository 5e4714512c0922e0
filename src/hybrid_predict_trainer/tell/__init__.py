"""What is told: records and the summary.

`recorder` (events out, nothing back), `summary` (figures put together).
"""
