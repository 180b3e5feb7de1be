"""Faster encoders with equal ids: piecewise encoding of long documents, and gigatoken."""
