"""Batches of LoRAs: stacked factors, their algebra, and the layer that adds them to a frozen model."""
