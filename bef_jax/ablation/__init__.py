"""The ablation table of the paper: a training run for each row and seed, then its pictures."""
