"""The registry of families against running models."""
