"""Measurements: speed against other libraries, growth, fleets, and what results.md quotes."""

from mta.system.process import limit_threads

limit_threads()  # before torch is imported, as the command line does
