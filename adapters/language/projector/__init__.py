"""Between vision encoder and language model: what the tower saw, the images of a prompt, and the plan on them."""
