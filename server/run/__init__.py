"""One run from start to finish: the rounds, what happens around them, and how it is launched."""
