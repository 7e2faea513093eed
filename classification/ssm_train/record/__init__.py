"""What a run leaves: checkpoints, logs, results, report; and what watches it while it runs."""
