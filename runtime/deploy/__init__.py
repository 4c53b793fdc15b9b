"""An artifact → a folder that an engine for many machines serves: Triton, Ray Serve, or a container."""
