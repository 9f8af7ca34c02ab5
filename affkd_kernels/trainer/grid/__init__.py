"""A study: many runs of one plan, resumable at any moment, and the table that comes of them."""
