"""Methods that act inside the language model during prefill, one file each."""
