"""HTTP: what goes in and out, who may ask, and how errors look. Knows nothing of Ray Serve."""
