"""One run file under many settings, and the files that name them."""
