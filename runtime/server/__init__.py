"""HTTP in front of a `Service`: what `otc serve` runs. Needs the extra `[server]`."""
