"""The sites of a run as the coordinator sees them: drawing, asking, collecting and scoring, and the audit log of it."""
