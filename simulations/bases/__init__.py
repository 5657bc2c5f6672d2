"""Base models that are fetched by name."""
