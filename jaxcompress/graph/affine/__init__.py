"""Affine chains: the affine functions, with coefficients from params, that follow a site."""
