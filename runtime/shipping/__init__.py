"""An artifact → one file and back; signatures; verification."""
