"""Golden traces: short runs that an earlier build and the present one must agree on to the last bit.

``python -m tests.golden --against PATH`` from the root of the repository, PATH another checkout (``git worktree add``).
:mod:`.runs` says what is run, :mod:`.drive` runs it, :mod:`.trace` records and compares, :mod:`.builds` loads either
build.  The runs use the public interface and today's names of settings alone, so that both builds understand them.
"""
