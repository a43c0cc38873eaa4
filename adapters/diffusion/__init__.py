"""Denoisers of diffusers: where their transformer blocks are, and modules in these that run on merged tokens."""
