"""A model's name → the loaded pipeline: found, refused where it is not safe, identified by digests."""
