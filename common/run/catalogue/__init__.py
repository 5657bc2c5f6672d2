"""Facts of methods of aggregation and of kinds of adapters."""
