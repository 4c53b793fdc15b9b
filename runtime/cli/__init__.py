"""The serving host's commands: click options → calls of the other rooms."""
