"""The model: its base, the adapter on it, and what a token of it costs. This room loads torch."""
