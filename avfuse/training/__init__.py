"""Training: settings, the loop that pretraining and tasks share, checkpoints, judging, a run's report."""
