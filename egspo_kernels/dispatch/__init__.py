"""Which backend runs, and the compiled libraries."""
