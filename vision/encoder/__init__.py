"""Methods that act inside a vision transformer, one file each."""
