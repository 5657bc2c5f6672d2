"""The settings: one module a section of the run file, and the tables of both files."""
