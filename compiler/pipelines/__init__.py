"""How a diffusers pipeline calls its transformer: probed, recorded, run in full, and called again as it does."""
