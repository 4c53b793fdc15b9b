"""Prompts → pictures: requests are read, conditioned, sampled and queued."""
