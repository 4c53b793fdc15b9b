"""A compile or a comparison on many workers: Ray starts them, replaces them and carries a few numbers.

Nothing outside of this room imports Ray, and this room is imported only where workers are asked for.
"""
