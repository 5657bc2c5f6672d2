"""What a run's events say, in words and figures; every page draws on it."""
