"""Writers of exported files, one function per format."""
