"""The run file: read, checked, and what follows from it alone (manifest, tensors, what leaves a site)."""
