"""Variational families q(z; λ), a file a family: plain Pyro functions and modules."""
