"""Models that SGLang loads from outside (SGLANG_EXTERNAL_MODEL_PACKAGE), with routers of their own."""
