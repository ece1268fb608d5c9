"""Affine chains: what affine functions, with coefficients from params, make of a site's result."""
