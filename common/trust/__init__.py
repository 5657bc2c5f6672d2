"""Who is who, and what each has signed: identities, certificates, roster, start-up kits, audit logs and their heads."""
