"""Regularization: penalties that bring whole units to zero in training."""
