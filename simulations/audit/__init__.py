"""What an attacker gets, against what is claimed."""
