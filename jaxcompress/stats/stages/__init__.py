"""Stages: a captured call as a list of steps that stops before each selected site."""
