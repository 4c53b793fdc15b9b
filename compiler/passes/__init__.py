"""The passes of a compile in their order, one file for each: options → artifact. `session` is what they share."""
