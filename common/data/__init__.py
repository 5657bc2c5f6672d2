"""Rows from files: the same reading for a site's rows and for the coordinator's own held-out rows."""
