"""Serving: engines that batch requests of different people over one base, and the HTTP gateway."""
