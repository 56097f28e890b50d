"""Doubles that stand in at the seams: a scripted engine and a store in memory. No serving module imports them."""
