"""Virtual sites that cheat, and what each way to aggregate makes of them."""
