"""Inside one MoE layer: the re-routing stage, the CPU runner. Knows SGLang, knows no policy."""
