"""Programs of their own that preflight starts: they load torch, and say what they find."""
