"""A bank's calibration: what it is (``info``, ``laplace``), and how it is measured on people outside the bank."""
