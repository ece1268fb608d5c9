"""Dims: which indices of which axes are the same index, and the function on fewer of them."""
