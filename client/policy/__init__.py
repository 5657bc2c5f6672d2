"""A site's policy: its file, its rules, and the figures that a site reports under it."""
