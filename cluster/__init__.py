"""Submitting commands to a Ray cluster; imports none of the other packages."""
