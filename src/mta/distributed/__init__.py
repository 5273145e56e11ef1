"""Where pieces of work run: in this process or on a Ray cluster."""
