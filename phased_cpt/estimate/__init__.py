"""What a phase will need, from the configuration alone: memory and time. Arithmetic, and what it was held to."""
