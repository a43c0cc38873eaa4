"""Methods for videos, language stage; one file each."""
