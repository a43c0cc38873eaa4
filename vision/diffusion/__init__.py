"""Methods that act inside a denoiser of diffusion models, one file each."""
