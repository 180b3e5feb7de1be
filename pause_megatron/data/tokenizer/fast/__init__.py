"""Faster ways to the same ids: long documents cut where no id can tell, and gigatoken where ids are proven equal."""
