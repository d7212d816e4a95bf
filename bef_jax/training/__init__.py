"""From one training step to a run: state, optimiser, checkpoints, and what a run logs."""
