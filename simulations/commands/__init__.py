"""What the commands do: their options, and what is done between these and printing."""
