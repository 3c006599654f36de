"""Plans: the arithmetic of fitted transforms as data, run by numpy alone. docs/plan-format.md describes the files.

`layouts` says what a value of a plan is, `operations`, `encoders`, `statistics`, `words` and `pictures` are the closed list of
operations, `files` reads and writes plans, `planner` makes them from fitted transforms; only the last imports scikit-learn.
"""
