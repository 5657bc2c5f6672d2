"""Aggregation methods: one file a method, one table of facts."""
