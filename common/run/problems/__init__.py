"""How a problem of a file is reported: its line, the nearest key, names that people bring from elsewhere."""
