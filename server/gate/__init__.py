"""What an adapter must show before it is exported, when rounds end early, and how far back a failed gate goes."""
