"""What the runner does with the outside world: the folder of a run and what is written into it."""
