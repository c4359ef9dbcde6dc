"""Generative models p(x, z; θ), a file a family: plain Pyro functions, no part of one in another."""
