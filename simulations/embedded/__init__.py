"""The small base model and the synthetic records of the demo."""
