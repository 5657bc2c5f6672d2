"""Figures of a global adapter: held-out losses now, tasks and gates later."""
