"""Exact inference: log Z and its posterior."""
