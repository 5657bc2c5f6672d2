"""Programs for whoever works on silotune; none of them is shipped."""
