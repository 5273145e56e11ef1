"""Membership inference against a bank and against people's models."""
