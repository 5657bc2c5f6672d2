"""Other ways to run the same sites: Flower's engines, and the whole deployment on one machine."""
