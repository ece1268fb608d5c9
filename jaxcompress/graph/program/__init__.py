"""Programs: one normal form of a jaxpr over JAX versions, one walk over it, and one run of it."""
