"""Methods for videos, projector stage; one file each."""
