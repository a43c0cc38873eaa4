"""Everything that is measured on a CUDA device, in one command with a time limit: ``make gpu``."""
