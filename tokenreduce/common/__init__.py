"""What stands below everything and knows nothing of tokens: words, files, pictures."""
