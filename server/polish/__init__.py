"""After the last round: stages on the coordinator's own data, through TRL."""
