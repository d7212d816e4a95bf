"""The ablation table of the paper: one training run for each row and seed, then the table."""
