"""Sizes that an artifact serves beside the one it was compiled at: what is asked for → what the stages take."""
