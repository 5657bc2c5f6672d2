"""The coordinator: rounds, aggregation, evaluation, export."""
