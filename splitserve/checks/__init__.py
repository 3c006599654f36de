"""Checks of whole repositories (`matrix`) and of running systems (`verify`)."""
