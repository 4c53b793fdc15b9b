"""What compiler and runtime agree on: errors, programs, the manifest and its digests. Imports pydantic only."""
