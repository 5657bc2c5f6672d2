"""The small base model and the synthetic records that ship with silotune, and the scripts that make them."""
