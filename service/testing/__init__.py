"""Test doubles: a scripted engine and a store in memory. No module that serves requests imports them."""
