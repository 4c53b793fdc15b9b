"""The methods that `otc compare` measures otcache against, each a small function or an adapter over the library that
has it.

`method` says what a method is; `programs` holds those that come down to a list of coefficients, `hooks` those that run
inside the pipeline and decide there.
"""
