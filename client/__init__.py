"""What runs beside private data; only updates and agreed counts leave it."""
