"""Preference data at the coordinator: built, imported from other tools, and ranked blind by people."""
