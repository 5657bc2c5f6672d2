"""Clipping, noise, and what a run costs in privacy."""
