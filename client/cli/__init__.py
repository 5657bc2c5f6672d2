"""The commands of `silotune-client`."""
