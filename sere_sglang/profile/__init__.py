"""The profile file, similarity measures and calibration arithmetic. Nothing here imports SGLang."""
