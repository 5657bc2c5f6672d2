"""One module a method of aggregation, and the table of them."""
