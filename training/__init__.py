"""Training of the packaged policy, from scratch; not part of the installed package."""
