"""The first minutes on a GPU: what they are spent on, in order of value."""
