"""One file (or folder) per feature; a slice imports the kernel and never another slice."""
