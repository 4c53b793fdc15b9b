"""The sampling loop on host or device, and the protocol that it asks of a backend."""
