"""What a site's machine lacks before it can take part in a run, each failure with its remedy; see `examine`."""
