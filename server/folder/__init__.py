"""What a run's folder holds: its lock, its checkpoints, its settings."""
