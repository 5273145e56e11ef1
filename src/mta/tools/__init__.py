"""Tools around the method: cost estimates, checks of the machine, inspection of a person, the demo."""
