"""The commands of `silotune-sim`."""
