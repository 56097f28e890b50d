"""The HTTP API: `routes` has one module for each resource, `http` what every request passes.

May import everything below. A route translates a request into a call of the sessions, and the result into an answer.
"""
