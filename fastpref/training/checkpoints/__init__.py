"""What a run writes, so that a kill loses nothing: durable files, checkpoints, models and the run's folder."""
