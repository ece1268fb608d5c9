"""Importance: how much each unit of a group would be missed, method by method."""
