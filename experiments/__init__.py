"""The shipped experiments, data files of the package."""
