"""Trains and publishes the demo models. No service imports it."""
