"""The adapter: its tensors, ranks and start, and the forms in which updates travel."""
