"""Statistics of episodes: intervals, comparisons of two policies, repeated plays, and agreement of raters.

The functions are pure. They take numpy arrays without NaN and return plain floats. `statistics.py` lists them.
"""
