"""Guidance: which weight a term should have."""
