"""The parts of a run: prepared, checked, fitted, gathered into tables, written into its folder."""
