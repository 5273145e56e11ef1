"""One base for everybody: engines that answer rows of different people together, and the gateway in front of them."""
