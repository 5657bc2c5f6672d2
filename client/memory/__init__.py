"""What a site remembers of runs: history, consent, heads of other logs, what it has paid."""
