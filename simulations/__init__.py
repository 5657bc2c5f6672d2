"""Research on one machine: virtual sites through the very functions that production uses."""
