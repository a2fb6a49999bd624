"""In torch, for any device: what the other implementations are held against."""
