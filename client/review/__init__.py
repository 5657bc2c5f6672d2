"""A run and a policy in words, for who decides at a site."""
