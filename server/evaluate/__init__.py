"""Figures of an adapter on the coordinator's own rows: tasks, scores by row, intervals."""
