"""Whether an exported folder is what its seal says."""
