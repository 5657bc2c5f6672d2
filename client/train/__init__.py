"""Local training: the steps, the schedule and the one place where gradients are taken."""
