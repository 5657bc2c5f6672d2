"""Who is in a federation: founding it, admitting and revoking, and what a site is given."""
