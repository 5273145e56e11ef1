"""The HTTP gateway: routes, keys, limits, jobs, and streaming."""
