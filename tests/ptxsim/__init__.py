"""A functional PTX simulator for tests: see README.md in this folder."""
