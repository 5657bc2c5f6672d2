"""The base model: its files, its weights at each precision, and how it is loaded and probed."""
