"""Methods of the projector stage, one file each."""
