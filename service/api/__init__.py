"""The HTTP API. `routes` has one module for each resource; `http` has the code that all requests share.

A route translates a request into a method call on the sessions, and the result into an HTTP response. This package may
import every lower layer.
"""
