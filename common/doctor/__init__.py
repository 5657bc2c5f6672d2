"""What both doctors share: results, checks, probes of addresses."""
