"""One module per SGLang seam that has no extension point: the symbol, the versions, why."""
