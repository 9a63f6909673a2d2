"""Quantisation by measurement: codes and scales chosen for what the model itself computes."""
