"""Methods for videos, encoder stage; one file each."""
