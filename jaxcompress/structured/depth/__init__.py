"""Depth: residual blocks and layers, scored, gated and dropped."""
