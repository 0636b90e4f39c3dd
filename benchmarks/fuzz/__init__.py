"""Damaged inputs for everything that reads a file: no traceback, no hang, nothing half-written."""
