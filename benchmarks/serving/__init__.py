"""What only this repository's serving benchmarks need: the demo model's text, padded, its floor.

How a server is started, loaded and walked through text is `sere_sglang.measure`.
"""
