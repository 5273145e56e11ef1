"""A bank's calibration: what it is (``result``), and how it is measured on people who are not in the bank."""
