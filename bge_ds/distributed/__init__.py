"""Collectives with gradients, and the profile of communication. Knows no models."""
