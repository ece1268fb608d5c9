"""Cost: counted from the jaxpr, and by the compilers of targets that need not be attached."""
