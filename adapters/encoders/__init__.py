"""Vision encoders: the block that reduces, and the families of timm, open_clip and transformers."""
