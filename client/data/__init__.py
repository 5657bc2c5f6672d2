"""A site's own rows: read, check, split, tokenise."""
