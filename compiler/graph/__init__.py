"""A transformer → embed | blocks | head: traced, labelled, split, without an adapter for any model."""
