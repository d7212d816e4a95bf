"""Training: the step, the state, the optimiser, checkpoints, and the logs of a run."""
