"""Pages of a run: terminal, status, report, symptoms, and the page of methods."""
