"""The build host's commands: click options → calls of `passes` and `compare`. Nothing else imports click."""
