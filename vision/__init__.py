"""What reduces the tokens of images: one file per method, a folder per stage; and the ImageNet script."""
