"""Methods of the cache stage, one file each."""
