"""SERE inside one scheduler process: a rank with its state, its device and its clock.

`rank` joins the rest: `bind`, `stage` and `control` act on the model, `counters`, `clock` and
`metrics` watch it, `probe` measures at start what its layers cost.
"""
