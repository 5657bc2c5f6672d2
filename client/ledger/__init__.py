"""What units have spent: the encrypted file, the arithmetic, reserve and settle."""
