"""An OpenAI-compatible endpoint for exported adapters."""
