"""Architectures over sequences compared on the user's numbers: stock and swapped, measured, with advice."""
