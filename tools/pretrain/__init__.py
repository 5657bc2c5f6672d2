"""Where the small base model of the demo and the rows of a fictional coordinator come from."""
