"""Evidence of a compile → its report: figures, pictures and the page."""
