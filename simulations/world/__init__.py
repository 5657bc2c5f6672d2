"""Virtual sites: rows divided among them, agents, grids, a run of them, and what is compared to it."""
