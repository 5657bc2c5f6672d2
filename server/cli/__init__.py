"""The commands of `silotune-server`."""
