"""Models that SGLang loads from outside, with routers of their own."""
