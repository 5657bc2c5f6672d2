"""Joining a federation: keys, the start-up kit, membership."""
