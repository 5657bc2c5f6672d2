"""Figures of answers and likelihoods, and their intervals."""
