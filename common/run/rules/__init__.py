"""What does not go together in a run file; `rules` is the table of it all."""
