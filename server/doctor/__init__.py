"""What a coordinator's machine lacks before a run can start, each failure with its remedy; see `examine`."""
